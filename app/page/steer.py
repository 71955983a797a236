"""Steer: change features while the model reads a text and goes on, beside what it writes by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import streamlit as st

from saebench_app import answers
from saebench_app.components.notice import notice
from saebench_app.components.passage import Lane, passage
from saebench_app.components.table import Cell, Heading, table
from saebench_app.described import Described, describe
from saebench_app.numbers import number, share
from saebench_app.runs import run_of, why_no_run
from saebench_app.session import Here
from saebench_app.text import visible
from saebench_app.view import whole

if TYPE_CHECKING:
    from saebench.analysis.interventions import Steering

PATH = "steer"
TITLE = "Steer"
SECTION = "Ask"

WAYS = {
    "add": "add to its value",
    "clamp": "set its value",
    "scale": "multiply its value",
    "ablate": "set it to 0",
}
SWEEP = (0.5, 1.0, 2.0, 4.0)
"""Strengths that are proposed: times the feature's largest activation; when scaling, as they are."""
MOST_STRENGTHS, MOST_FEATURES, MOST_TOKENS = 12, 8, 100
LONGEST = 4000
"""Characters of a text: an address has to hold it."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the URL asks of this page."""

    text: str = ""
    f: tuple[int, ...] = ()
    how: str = "add"
    strength: str = ""
    """Numbers with commas; empty: those that are proposed."""
    new: int = 20
    temp: float = 0.0
    seed: int = 0
    s: int | None = None
    """Which of the strengths is shown; None for one in the middle."""

    @classmethod
    def from_query(cls, params: Mapping[str, str]) -> Asked:
        given = (whole(part.strip()) for part in params.get("f", "").split(","))
        new = whole(params.get("new"))
        return cls(
            text=params.get("text", "")[:LONGEST],
            f=tuple(dict.fromkeys(f for f in given if f is not None))[:MOST_FEATURES],
            how=params["how"] if params.get("how") in WAYS else "add",
            strength=params.get("strength", "")[:200],
            new=20 if new is None else min(new, MOST_TOKENS),
            temp=_temperature(params.get("temp")),
            seed=whole(params.get("seed")) or 0,
            s=whole(params.get("s")),
        )

    def query(self) -> dict[str, str]:
        """What ``from_query`` reads back; defaults are left out."""
        given = {one.name: getattr(self, one.name) for one in fields(self)}
        changed = {one.name: given[one.name] for one in fields(self) if given[one.name] != one.default}
        return {name: _written(value) for name, value in changed.items()}

    def strengths(self, known: Mapping[int, Described]) -> list[float] | None:
        """The numbers that are tried, or None when they are no numbers."""
        if self.how == "ablate":
            return [0.0]
        if self.strength.strip():
            try:
                values = [float(part) for part in self.strength.replace(";", ",").split(",") if part.strip()]
            except ValueError:
                return None
            fine = 0 < len(values) <= MOST_STRENGTHS and all(map(math.isfinite, values))
            return list(dict.fromkeys(values)) if fine else None
        unit = 1.0 if self.how == "scale" else max((known[f].max_act for f in self.f), default=1.0) or 1.0
        return [float(f"{times * unit:.2g}") for times in SWEEP]


def show(here: Here) -> None:
    asked = Asked.from_query(st.query_params.to_dict())
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


def _controls(here: Here, asked: Asked, known: Mapping[int, Described]) -> None:
    shown = {
        "text": asked.text, "f": ", ".join(map(str, asked.f)), "how": asked.how, "strength": asked.strength,
        "new": asked.new, "temp": asked.temp, "seed": asked.seed,
    }  # fmt: skip
    st.session_state.update({f"steer_{name}": value for name, value in shown.items()})

    def apply() -> None:
        chosen = {name: st.session_state.get(f"steer_{name}", value) for name, value in shown.items()}
        given = {name: _written(value) for name, value in chosen.items()}
        here.show(here.view, **Asked.from_query(given).query())

    st.text_area("Text", key="steer_text", on_change=apply, height=92, max_chars=LONGEST,
                 placeholder="How the model's text begins")  # fmt: skip
    proposed = asked.strengths({}) if not known else replace(asked, strength="").strengths(known)
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        st.text_input("Features", key="steer_f", on_change=apply, width=150, placeholder="3, 17",
                      help="One, or several with commas, all changed in the same way.")  # fmt: skip
        st.selectbox("Change", list(WAYS), format_func=lambda way: WAYS[way], key="steer_how",
                     on_change=apply, width=190)  # fmt: skip
        if asked.how != "ablate":
            st.text_input(
                "Strengths", key="steer_strength", on_change=apply, width=210,
                placeholder=", ".join(f"{value:g}" for value in proposed or ()),
                help="Tried one after the other, with commas between them. Proposed: 0.5, 1, 2 and 4, when "
                "adding or setting times the largest activation on the store's text.",
            )  # fmt: skip
        st.number_input("New tokens", 1, MOST_TOKENS, key="steer_new", on_change=apply, width=130)
        st.number_input("Temperature", 0.0, 2.0, step=0.1, key="steer_temp", on_change=apply, width=130,
                        help="0 takes the likeliest token each time; above it tokens are drawn.")  # fmt: skip
        if asked.temp:
            st.number_input("Seed", 0, 10**9, key="steer_seed", on_change=apply, width=130)


def _run(here: Here, asked: Asked, strengths: list[float], work: object) -> None:
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
    here: Here, asked: Asked, strengths: list[float], known: Mapping[int, Described], found: Steering
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


def _sweep(here: Here, asked: Asked, strengths: list[float], at: int, found: Steering) -> None:
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
            Cell(visible(row["text"], edges=True), kind="token"),
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


def _temperature(value: str | None) -> float:
    try:
        found = float(value or 0)
    except ValueError:
        return 0.0
    return min(max(found, 0.0), 2.0) if math.isfinite(found) else 0.0


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
