"""Steer: change features while the model reads and continues a text, beside the text without steering."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import streamlit as st

from saebench.core.formatting import number, share, visible
from saebench_app import answers
from saebench_app.answers import LONGEST_TEXT
from saebench_app.components import CONTROL_WIDTH
from saebench_app.components.notice import notice
from saebench_app.components.passage import Lane, passage
from saebench_app.components.table import Cell, Heading, table
from saebench_app.described import Described, describe
from saebench_app.page.steer.query import CHANGES, MOST_SEED, MOST_STRENGTHS, MOST_TOKENS, Steer
from saebench_app.runs import run_of, why_no_run
from saebench_app.session import Here

if TYPE_CHECKING:
    from saebench.analysis.interventions import Steering

PATH = "steer"
TITLE = "Steer"
SECTION = "Inspect"


def show(here: Here) -> None:
    asked = here.read(Steer)
    st.title("Steer")
    if run_of(here) is None:
        notice(why_no_run(here), key="no-run")
        return
    for feature in asked.f:
        here.store.feature(feature)  # raises for one that does not exist
    known = describe(here.store, asked.f)
    _controls(here, asked, known)
    strengths = asked.strengths(known)
    if not (asked.f and asked.text):
        notice(
            "Enter a feature and a text: the model continues the text with and without steering.", key="empty"
        )
        return
    if strengths is None:
        notice(
            f"Strengths must be 1 to {MOST_STRENGTHS} numbers with commas between them, such as 2, 4.5, 8.",
            key="strengths",
            kind="error",
        )
        return
    work = (here.store.sae, here.store.info()["sae_hash"], replace(asked, s=None), tuple(strengths))
    _run(here, asked, strengths, work)
    done = st.session_state.get("steered")
    if done is None or done[0] != work:
        if st.session_state.get("steering") != work:
            notice("Press Steer to run the model. The same URL gives the same texts again.", key="ready")
        return
    _results(here, asked, strengths, known, done[1])


def _controls(here: Here, asked: Steer, known: Mapping[int, Described]) -> None:
    shown = {
        "text": asked.text,
        "f": ", ".join(map(str, asked.f)),
        "how": asked.how,
        "strength": asked.strength,
        "new": asked.new,
        "temp": asked.temp,
        "seed": asked.seed,
    }
    st.session_state.update({f"steer_{name}": value for name, value in shown.items()})

    def apply() -> None:
        chosen = {name: st.session_state.get(f"steer_{name}", value) for name, value in shown.items()}
        given = {
            name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in chosen.items()
        }
        here.show(here.view, Steer.read(given))

    st.text_area(
        "Text",
        key="steer_text",
        on_change=apply,
        height=92,
        max_chars=LONGEST_TEXT,
        placeholder="The beginning of the text",
    )
    proposed = asked.strengths({}) if not known else replace(asked, strength="").strengths(known)
    with st.container(horizontal=True, gap="small", vertical_alignment="bottom"):
        st.text_input(
            "Features",
            key="steer_f",
            on_change=apply,
            width=CONTROL_WIDTH,
            placeholder="3, 17",
            help="One feature, or several with commas between them. All are changed in the same way.",
        )
        st.selectbox(
            "Change",
            list(CHANGES),
            format_func=CHANGES.__getitem__,
            key="steer_how",
            on_change=apply,
            width=CONTROL_WIDTH,
        )
        if asked.how != "ablate":
            st.text_input(
                "Strengths",
                key="steer_strength",
                on_change=apply,
                width=CONTROL_WIDTH,
                placeholder=", ".join(f"{value:g}" for value in proposed or ()),
                help="Numbers with commas between them, tried in turn. By default 0.5, 1, 2 and 4; "
                "times the max activation in the store when the activation is added to or set.",
            )
        st.number_input("New tokens", 1, MOST_TOKENS, key="steer_new", on_change=apply, width=CONTROL_WIDTH)
        st.number_input(
            "Temperature",
            0.0,
            2.0,
            step=0.1,
            key="steer_temp",
            on_change=apply,
            width=CONTROL_WIDTH,
            help="0: always the most likely token. Above 0: tokens are sampled.",
        )
        if asked.temp:
            st.number_input("Seed", 0, MOST_SEED, key="steer_seed", on_change=apply, width=CONTROL_WIDTH)


def _run(here: Here, asked: Steer, strengths: list[float], work: object) -> None:
    """The button, and the steering once it was pressed; any other click on the page stops it."""
    running = st.session_state.get("steering") == work

    def set_to(steering: object) -> None:
        st.session_state["steering"] = steering

    place = st.empty()
    start = partial(place.button, "Steer", type="primary", key="steer_start", on_click=set_to, args=(work,))
    if not running:
        start()
        return
    place.button("Stop steering", key="steer_stop", on_click=set_to, args=(None,))
    progress = st.progress(0.0, text="Reading the text")
    total, done = (1 + len(strengths)) * asked.new, 0

    def on_token() -> None:
        nonlocal done
        done += 1
        texts = f"text {min((done - 1) // asked.new + 1, 1 + len(strengths))} of {1 + len(strengths)}"
        progress.progress(min(done / total, 1.0), text=f"Generating {texts}")

    try:
        found = answers.steer(
            here,
            asked.text,
            list(asked.f),
            strength=strengths,
            on_token=on_token,
            new_tokens=asked.new,
            mode="clamp" if asked.how == "ablate" else asked.how,
            temperature=asked.temp,
            seed=asked.seed,
        )
        st.session_state["steered"] = (work, found)
    finally:
        if st.session_state.get("steering") == work:
            st.session_state["steering"] = None
    progress.empty()
    start()


def _results(
    here: Here, asked: Steer, strengths: list[float], known: Mapping[int, Described], found: Steering
) -> None:
    last = len(strengths) - 1
    at = last // 2 if asked.s is None else min(asked.s, last)
    strength = strengths[at]
    texts = found.texts.to_dict("records")
    left, right = st.columns(2, gap="medium")
    with left:
        st.subheader("Without steering")
        passage([asked.text, texts[at]["clean"]], name="Text without steering", key="base", quiet=1)
    with right:
        st.subheader("Steered" if asked.how == "ablate" else f"Steered with strength {number(strength)}")
        passage([asked.text, texts[at]["steered"]], name="Text with steering", key="steered", quiet=1)
    if len(strengths) > 1:
        _sweep(here, asked, strengths, at, found)
    left, right = st.columns([11, 9], gap="medium")
    with left:
        _next_tokens(found, strength)
    with right:
        _along(found, strength)


def _sweep(here: Here, asked: Steer, strengths: list[float], at: int, found: Steering) -> None:
    from saebench.analysis import figures

    left, right = st.columns([11, 9], gap="medium")
    edited = found.effects[found.effects["edited"]].groupby("strength")["kl"].mean()
    with left:
        st.subheader("All strengths")
        rows = [
            [
                Cell(
                    number(strength),
                    exact=strength,
                    bar=1.0 if place == at else None,
                    href=here.view.url(PATH, replace(asked, s=place)),
                ),
                Cell(number(edited.get(strength)), exact=edited.get(strength)),
                Cell(visible(text), kind="words"),
            ]
            for place, (strength, text) in enumerate(zip(strengths, found.texts["steered"], strict=True))
        ]
        headings = [
            Heading("strength"),
            Heading(
                "mean KL",
                help="KL divergence of the predictions on the text from those without steering, in nats",
            ),
            Heading("continuation", align="left"),
        ]
        table(headings, rows, name="All strengths", key="sweep")
    with right:
        st.subheader("Change of the predictions")
        figure = figures.steering_curve(found)
        figure.update_layout(height=210, margin={"l": 0, "r": 0, "t": 6, "b": 0})
        st.plotly_chart(
            figure,
            key="curve",
            config={"displayModeBar": False},
            alt="Mean and largest KL divergence of the predictions on the text, by strength",
        )


def _next_tokens(found: Steering, strength: float) -> None:
    st.subheader(
        "The next token", help="The 10 most likely tokens after the text, with and without steering."
    )
    frame = found.next_tokens[found.next_tokens["strength"] == strength]
    most = float(frame["difference"].abs().max()) or 1.0
    rows = [
        [
            Cell(visible(row["text"], spaces="edges"), kind="token"),
            Cell(share(math.exp(row["logp_clean"])), exact=row["logp_clean"]),
            Cell(share(math.exp(row["logp_steered"])), exact=row["logp_steered"]),
            Cell(
                number(row["difference"]),
                exact=row["difference"],
                bar=abs(row["difference"]) / most,
                kind="" if row["difference"] >= 0 else "cold",
            ),
        ]
        for row in frame.to_dict("records")
    ]
    headings = [
        Heading("token", align="left"),
        Heading("without"),
        Heading("steered"),
        Heading("change", help="log-probability with steering minus without, in nats"),
    ]
    table(headings, rows, name="The next token", key="next", height="28rem")


def _along(found: Steering, strength: float) -> None:
    st.subheader(
        "Where the predictions change",
        help="KL divergence of the prediction at each token from the one without steering.",
    )
    effects = found.effects[found.effects["strength"] == strength]
    kl = effects["kl"].tolist()
    lane = Lane(kl, max(map(abs, kl)), "KL divergence", note="in nats")
    passage(effects["token"].tolist(), [lane], name="Where the predictions change", key="along")
