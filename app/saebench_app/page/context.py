"""Context: a piece of the text as the model read it, with up to four features laid over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import streamlit as st

from saebench.core.errors import UserError
from saebench.core.formatting import number, share, visible
from saebench_app.asked import Place
from saebench_app.components.notice import notice
from saebench_app.components.passage import LANES, Lane, passage
from saebench_app.components.table import Cell, Heading, table
from saebench_app.described import Described, describe
from saebench_app.session import Here

if TYPE_CHECKING:
    import pandas as pd

PATH = "context"
TITLE = "Context"
SECTION = "Ask"


def show(here: Here) -> None:
    place, store = Place.from_query(st.query_params.to_dict()), here.store
    if not store.has("context"):
        st.title("Context")
        reason = store.info()["missing"].get("context", "the store was indexed without it")
        notice(f"The store has no contexts to show: {reason.rstrip('.')}.", key="no-contexts")
        return
    context = store.context(place.c)
    _header(here, place, context)
    known = describe(store, place.features)
    for feature in place.features:
        store.feature(feature)  # complains of one that is not there
    acts = _acts(store.context_features(place.c, place.features), context["n_tokens"]) if known else {}
    pos = None if place.pos is None else min(place.pos, context["n_tokens"] - 1)
    left, right = st.columns([13, 9], gap="medium")
    with left:
        _text(here, place, context, known, acts, pos)
        _add(here, place)
    with right:
        _at_token(here, place, context, pos)


def _header(here: Here, place: Place, context: dict[str, Any]) -> None:
    last = here.store.info()["n_contexts"] - 1
    st.session_state["context_goto"] = place.c

    def go(c: int) -> None:
        here.show(here.view, **replace(place, c=c, pos=None).query())

    with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
        st.title(f"Context {place.c}", width="content")
        with st.container(horizontal=True, vertical_alignment="center", width="content"):
            st.button("Previous", shortcut="Left", disabled=place.c == 0, on_click=go, args=(place.c - 1,))
            st.button("Next", shortcut="Right", disabled=place.c == last, on_click=go, args=(place.c + 1,))
            st.number_input(
                "Go to context", 0, last, key="context_goto", width=120, label_visibility="collapsed",
                on_change=lambda: go(st.session_state["context_goto"]),
            )  # fmt: skip
    origin = f"{visible(context['label'])}, " if context["label"] else ""
    documents = len(set(context["docs"]))
    several = f", {documents} documents" if documents > 1 else ""
    notice(f"{origin}{context['n_tokens']:,} tokens{several}", key="origin")


def _text(
    here: Here, place: Place, context: dict[str, Any], known: Mapping[int, Described],
    acts: Mapping[int, list[float]], pos: int | None,
) -> None:  # fmt: skip
    silent = [0.0] * context["n_tokens"]
    lanes = [
        Lane(
            acts.get(feature, silent), known[feature].max_act, f"Feature {feature}",
            here.view.url("feature", f=feature), known[feature].words,
            [("remove", here.view.url(PATH, **place.without(feature).query()), f"Remove feature {feature}")],
        )
        for feature in place.features
    ]  # fmt: skip
    passage(
        context["pieces"], lanes, name="Text of the context", key="context-text", current=pos,
        link=here.view.url(PATH, **replace(place, pos=None).query()) + "&pos=",
    )  # fmt: skip


def _add(here: Here, place: Place) -> None:
    if len(place.features) == LANES:
        st.caption("Four features are laid over the text; remove one to make room for another.")
        return

    def apply() -> None:
        if (feature := st.session_state["context_add"]) is not None:
            here.show(here.view, **place.with_(feature).query())

    st.session_state["context_add"] = None
    st.number_input(
        "Lay a feature over the text", 0, here.store.info()["d_sae"] - 1, value=None, key="context_add",
        on_change=apply, width=240, placeholder="number of a feature",
    )  # fmt: skip


def _at_token(here: Here, place: Place, context: dict[str, Any], pos: int | None) -> None:
    st.subheader("On one token")
    if pos is None:
        notice("Choose a token of the text to see all features that fire on it.", key="no-token")
        return
    passage([context["pieces"][pos]], name=f"The token at position {pos}", key="context-token")
    ready = f"fires-{here.store.path}-{here.store.generation}-{here.store.sae}-{place.c}"
    if not here.store.has("act_by_ctx") and not st.session_state.get(ready):
        notice(
            "This store was indexed without --with-context-index, so finding them reads all its activations.",
            key="no-index",
        )
        st.button("Find the features", on_click=lambda: st.session_state.update({ready: True}))
        return
    try:
        with st.spinner("Looking for what fires here"):
            fires = here.store.firing_at(place.c, pos)
    except UserError as error:
        notice(str(error), key="no-fires", kind="error")
        return
    if fires.empty:
        first = " The first token of a context is not indexed." if pos == 0 else ""
        notice(f"The store has no feature that fires here.{first}", key="silent")
        return
    known = describe(here.store, fires["feature"].tolist())
    largest = float(fires["value"].abs().max())
    rows = [
        [
            Cell(str(feature), exact=feature, href=here.view.url("feature", f=feature)),
            Cell(number(value), exact=value, bar=abs(value) / largest, kind="" if value >= 0 else "cold"),
            Cell(share(known[feature].density), exact=known[feature].density),
            Cell(known[feature].words, kind="words"),
            _toggle(here, place, feature),
        ]
        for feature, value in zip(fires["feature"].tolist(), fires["value"].tolist(), strict=True)
    ]
    headings = [
        Heading("feature", align="left"), Heading("value"),
        Heading("density", help="share of the store's tokens on which it fires"),
        Heading("what it is", align="left", help="its label, explanation, or most frequent token"),
        Heading("", align="left"),
    ]  # fmt: skip
    table(headings, rows, name="Features on the chosen token", key="fires", height="calc(100vh - 20rem)")


def _toggle(here: Here, place: Place, feature: int) -> Cell:
    on = feature in place.features
    other = place.without(feature) if on else place.with_(feature)
    return Cell("remove" if on else "show", href=here.view.url(PATH, **other.query()))


def _acts(fires: pd.DataFrame, n_tokens: int) -> dict[int, list[float]]:
    """feature -> its value on each token."""
    acts: dict[int, list[float]] = {}
    rows = zip(*(fires[name].tolist() for name in ("feature", "pos", "value")), strict=True)
    for feature, pos, value in rows:
        acts.setdefault(feature, [0.0] * n_tokens)[pos] = value
    return acts
