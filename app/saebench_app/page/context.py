"""Context: a piece of the text as the model read it, colored by up to four features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import streamlit as st

from saebench.core.errors import UserError
from saebench.core.formatting import number, share, visible
from saebench.sources.modality import modality
from saebench_app.components.notice import notice
from saebench_app.components.passage import LANES, Lane, passage
from saebench_app.components.table import Cell, Heading, table
from saebench_app.described import Described, describe
from saebench_app.session import Here
from saebench_app.url import Query, Whole, parameter

if TYPE_CHECKING:
    import pandas as pd

PATH = "context"
TITLE = "Context"
SECTION = "Inspect"


@dataclass(frozen=True, kw_only=True)
class Place(Query):
    """The parameters of this page: a context, a token of it, and up to four features."""

    c: int = parameter(0, Whole())
    pos: int | None = parameter(None, Whole())
    f1: int | None = parameter(None, Whole())
    f2: int | None = parameter(None, Whole())
    f3: int | None = parameter(None, Whole())
    f4: int | None = parameter(None, Whole())

    @property
    def features(self) -> tuple[int, ...]:
        lanes = (self.f1, self.f2, self.f3, self.f4)
        return tuple(dict.fromkeys(feature for feature in lanes if feature is not None))

    def showing(self, features: Sequence[int]) -> Place:
        """The same place with ``features``, at most four."""
        f1, f2, f3, f4 = (*features, None, None, None, None)[:LANES]
        return replace(self, f1=f1, f2=f2, f3=f3, f4=f4)

    def without(self, feature: int) -> Place:
        return self.showing([one for one in self.features if one != feature])

    def with_(self, feature: int) -> Place:
        """The same place with the feature shown, instead of the last one when there are four."""
        return self.showing([*self.without(feature).features[: LANES - 1], feature])


def show(here: Here) -> None:
    place, store = here.read(Place), here.store
    if not (store.has("context") or store.has("unit")):
        st.title("Context")
        reason = store.info()["missing"].get("context", "the store was indexed without it")
        notice(f"The store has no contexts to show: {reason.rstrip('.')}.", key="no-contexts")
        return
    context = store.context(place.c)
    _header(here, place, context)
    known = describe(store, place.features)
    for feature in place.features:
        store.feature(feature)  # raises for one that does not exist
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
        here.show(here.view, replace(place, c=c, pos=None))

    with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
        unit = modality(here.store.info().get("modality", "text")).unit
        st.title(f"{unit.capitalize()} {place.c}", width="content")
        with st.container(horizontal=True, vertical_alignment="center", width="content"):
            st.button("Previous", shortcut="Left", disabled=place.c == 0, on_click=go, args=(place.c - 1,))
            st.button("Next", shortcut="Right", disabled=place.c == last, on_click=go, args=(place.c + 1,))
            st.number_input(
                "Go to context",
                0,
                last,
                key="context_goto",
                width=120,
                label_visibility="collapsed",
                on_change=lambda: go(st.session_state["context_goto"]),
            )
    origin = f"{visible(context['label'])}, " if context["label"] else ""
    documents = len(set(context["docs"]))
    several = f", {documents} documents" if documents > 1 else ""
    unit = "tokens" if context["tokens"] else "positions"
    notice(f"{origin}{context['n_tokens']:,} {unit}{several}", key="origin")


def _text(
    here: Here,
    place: Place,
    context: dict[str, Any],
    known: Mapping[int, Described],
    acts: Mapping[int, list[float]],
    pos: int | None,
) -> None:
    inactive = [0.0] * context["n_tokens"]
    lanes = [
        Lane(
            acts.get(feature, inactive),
            known[feature].max_act,
            f"Feature {feature}",
            here.view.url("feature", f=feature),
            known[feature].words,
            [("remove", here.view.url(PATH, place.without(feature)), f"Remove feature {feature}")],
        )
        for feature in place.features
    ]
    passage(
        context["pieces"],
        lanes,
        name="Text of the context",
        key="context-text",
        current=pos,
        link=here.view.url(PATH, replace(place, pos=None)) + "&pos=",
    )


def _add(here: Here, place: Place) -> None:
    if len(place.features) == LANES:
        st.caption("At most four features can be shown on the text. Remove one to add another.")
        return

    def apply() -> None:
        if (feature := st.session_state["context_add"]) is not None:
            here.show(here.view, place.with_(feature))

    st.session_state["context_add"] = None
    st.number_input(
        "Show a feature on the text",
        0,
        here.store.info()["d_sae"] - 1,
        value=None,
        key="context_add",
        on_change=apply,
        width=240,
        placeholder="feature number",
    )


def _at_token(here: Here, place: Place, context: dict[str, Any], pos: int | None) -> None:
    st.subheader("On the selected token")
    if pos is None:
        notice("Select a token of the text to see all features that fire on it.", key="no-token")
        return
    passage([context["pieces"][pos]], name=f"The token at position {pos}", key="context-token")
    ready = f"fires-{here.store.path}-{here.store.generation}-{here.store.sae}-{place.c}"
    if not here.store.has("act_by_ctx") and not st.session_state.get(ready):
        notice(
            "The store was indexed without --with-context-index, so the search reads all its activations.",
            key="no-index",
        )
        st.button("Find the features", on_click=lambda: st.session_state.update({ready: True}))
        return
    try:
        with st.spinner("Searching for features that fire here"):
            fires = here.store.firing_at(place.c, pos)
    except UserError as error:
        notice(str(error), key="no-fires", kind="error")
        return
    if fires.empty:
        first = " The first token of a context is not indexed." if pos == 0 else ""
        notice(f"No feature of the store fires on this token.{first}", key="inactive")
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
        Heading("feature", align="left"),
        Heading("activation"),
        Heading("density", help="share of the store's tokens on which it fires"),
        Heading("name", align="left", help="its label, explanation, or top token"),
        Heading("", align="left"),
    ]
    table(headings, rows, name="Features on the selected token", key="fires", height="calc(100vh - 20rem)")


def _toggle(here: Here, place: Place, feature: int) -> Cell:
    on = feature in place.features
    other = place.without(feature) if on else place.with_(feature)
    return Cell("remove" if on else "show", href=here.view.url(PATH, other))


def _acts(fires: pd.DataFrame, n_tokens: int) -> dict[int, list[float]]:
    """Feature -> its activation on each token."""
    acts: dict[int, list[float]] = {}
    rows = zip(*(fires[name].tolist() for name in ("feature", "pos", "value")), strict=True)
    for feature, pos, value in rows:
        acts.setdefault(feature, [0.0] * n_tokens)[pos] = value
    return acts
