"""Steer: change features while the model reads a text and goes on, beside what it writes by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import streamlit as st

from saebench.core.formatting import number, share, visible
from saebench_app import answers
from saebench_app.asked import LONGEST, MOST_STRENGTHS, MOST_TOKENS, WAYS, Steer, written
from saebench_app.components.filters import WIDTH
from saebench_app.components.notice import notice
from saebench_app.components.passage import Lane, passage
from saebench_app.components.table import Cell, Heading, table
from saebench_app.described import Described, describe
from saebench_app.runs import run_of, why_no_run
from saebench_app.session import Here

if TYPE_CHECKING:
    from saebench.analysis.interventions import Steering

PATH = "steer"
TITLE = "Steer"
SECTION = "Ask"

NAMES = {
    "add": "add to its value",
    "clamp": "set its value",
    "scale": "multiply its value",
    "ablate": "set it to 0",
}


def show(here: Here) -> None:
    asked = Steer.from_query(st.query_params.to_dict())
    st.title("Steer")
    if run_of(here) is None:
        notice(why_no_run(here), key="no-run")
        return
    for feature in asked.f:
        here.store.feature(feature)  # complains of one that is not there
    known = describe(here.store, asked.f)
    _controls(here, asked, known)
    strengths = asked.strengths(known)
    if not (asked.f and asked.text):
        notice("Name a feature and write a text: the model then goes on with and without it.", key="empty")
        return
    if strengths is None:
        notice(f"Strengths are up to {MOST_STRENGTHS} numbers with commas between them, such as 2, 4.5, 8.",
               key="strengths", kind="error")  # fmt: skip
        return
    work = (here.store.sae, here.store.info()["sae_hash"], replace(asked, s=None), tuple(strengths))
    _run(here, asked, strengths, work)
    done = st.session_state.get("steered")
    if done is None or done[0] != work:
        if st.session_state.get("steering") != work:
            notice("Press Steer to run the model. The same address gives the same texts again.", key="ready")
        return
    _results(here, asked, strengths, known, done[1])


def _controls(here: Here, asked: Steer, known: Mapping[int, Described]) -> None:
    shown = {
        "text": asked.text, "f": ", ".join(map(str, asked.f)), "how": asked.how, "strength": asked.strength,
        "new": asked.new, "temp": asked.temp, "seed": asked.seed,
    }  # fmt: skip
    st.session_state.update({f"steer_{name}": value for name, value in shown.items()})

    def apply() -> None:
        chosen = {name: st.session_state.get(f"steer_{name}", value) for name, value in shown.items()}
        given = {name: written(value) for name, value in chosen.items()}
        here.show(here.view, **Steer.from_query(given).query())

    st.text_area("Text", key="steer_text", on_change=apply, height=92, max_chars=LONGEST,
                 placeholder="How the model's text begins")  # fmt: skip
    proposed = asked.strengths({}) if not known else replace(asked, strength="").strengths(known)
    with st.container(horizontal=True, gap="small", vertical_alignment="bottom"):
        st.text_input("Features", key="steer_f", on_change=apply, width=WIDTH, placeholder="3, 17",
                      help="One, or several with commas, all changed in the same way.")  # fmt: skip
        st.selectbox("Change", WAYS, format_func=lambda way: NAMES[way], key="steer_how",
                     on_change=apply, width=WIDTH)  # fmt: skip
        if asked.how != "ablate":
            st.text_input(
                "Strengths", key="steer_strength", on_change=apply, width=WIDTH,
                placeholder=", ".join(f"{value:g}" for value in proposed or ()),
                help="Tried one after the other, with commas between them. Proposed: 0.5, 1, 2 and 4, when "
                "adding or setting times the largest activation on the store's text.",
            )  # fmt: skip
        st.number_input("New tokens", 1, MOST_TOKENS, key="steer_new", on_change=apply, width=WIDTH)
        st.number_input("Temperature", 0.0, 2.0, step=0.1, key="steer_temp", on_change=apply, width=WIDTH,
                        help="0 takes the likeliest token each time; above it tokens are drawn.")  # fmt: skip
        if asked.temp:
            st.number_input("Seed", 0, 10**9, key="steer_seed", on_change=apply, width=WIDTH)


def _run(here: Here, asked: Steer, strengths: list[float], work: object) -> None:
    """The button, and the work once it was pressed: any other click on the page stops it."""
    running = st.session_state.get("steering") == work

    def set_to(steering: object) -> None:
        st.session_state["steering"] = steering

    place = st.empty()
    start = partial(place.button, "Steer", type="primary", key="steer_start", on_click=set_to, args=(work,))
    if not running:
        start()
        return
    place.button("Stop steering", key="steer_stop", on_click=set_to, args=(None,))
    progress = st.progress(0.0, text="The model is read")
    total, done = (1 + len(strengths)) * asked.new, 0

    def on_token() -> None:
        nonlocal done
        done += 1
        texts = f"text {min((done - 1) // asked.new + 1, 1 + len(strengths))} of {1 + len(strengths)}"
        progress.progress(min(done / total, 1.0), text=f"The model writes {texts}")

    try:
        found = answers.steer(
            here, asked.text, list(asked.f), strength=strengths, on_token=on_token, new_tokens=asked.new,
            mode="clamp" if asked.how == "ablate" else asked.how, temperature=asked.temp, seed=asked.seed,
        )  # fmt: skip
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
        st.subheader("By itself")
        passage([asked.text, texts[at]["clean"]], name="Text without steering", key="base", quiet=1)
    with right:
        st.subheader("Steered" if asked.how == "ablate" else f"Steered by {number(strength)}")
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
                Cell(number(strength), exact=strength, bar=1.0 if place == at else None,
                     href=here.view.url(PATH, **replace(asked, s=place).query())),
                Cell(number(edited.get(strength)), exact=edited.get(strength)),
                Cell(visible(text), kind="words"),
            ]
            for place, (strength, text) in enumerate(zip(strengths, found.texts["steered"], strict=True))
        ]  # fmt: skip
        headings = [
            Heading("strength"), Heading("mean KL", help="how far the predictions on the text move, in nats"),
            Heading("what the model writes", align="left"),
        ]  # fmt: skip
        table(headings, rows, name="All strengths", key="sweep")
    with right:
        st.subheader("How far the predictions move")
        figure = figures.steering_curve(found)
        figure.update_layout(height=210, margin={"l": 0, "r": 0, "t": 6, "b": 0})
        st.plotly_chart(
            figure, key="curve", config={"displayModeBar": False},
            alt="Mean and largest KL divergence of the predictions on the text, by strength",
        )  # fmt: skip


def _next_tokens(found: Steering, strength: float) -> None:
    st.subheader("The next token", help="The 10 likeliest with and without steering, after the text.")
    frame = found.next_tokens[found.next_tokens["strength"] == strength]
    most = float(frame["difference"].abs().max()) or 1.0
    rows = [
        [
            Cell(visible(row["text"], spaces="edges"), kind="token"),
            Cell(share(math.exp(row["logp_clean"])), exact=row["logp_clean"]),
            Cell(share(math.exp(row["logp_steered"])), exact=row["logp_steered"]),
            Cell(number(row["difference"]), exact=row["difference"], bar=abs(row["difference"]) / most,
                 kind="" if row["difference"] >= 0 else "cold"),
        ]
        for row in frame.to_dict("records")
    ]  # fmt: skip
    headings = [
        Heading("token", align="left"), Heading("by itself"), Heading("steered"),
        Heading("log-probability", help="steered minus by itself, in nats"),
    ]  # fmt: skip
    table(headings, rows, name="The next token", key="next", height="28rem")


def _along(found: Steering, strength: float) -> None:
    st.subheader("Where the predictions change", help="KL divergence of the prediction made at each token.")
    effects = found.effects[found.effects["strength"] == strength]
    kl = effects["kl"].tolist()
    lane = Lane(kl, max(map(abs, kl)), "KL divergence", note="in nats")
    passage(effects["token"].tolist(), [lane], name="Where the predictions change", key="along")
