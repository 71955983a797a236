"""Token: which features fire on one token, with examples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import streamlit as st

from saebench.core.errors import UserError
from saebench.core.formatting import count, number, share, visible
from saebench_app.components.notice import notice
from saebench_app.components.statistics import Statistic, statistics
from saebench_app.components.table import Cell, Heading, table
from saebench_app.components.tokens import examples
from saebench_app.described import Described, describe
from saebench_app.session import Here
from saebench_app.url import Choice, Query, Text, Whole, parameter

if TYPE_CHECKING:
    import pandas as pd

PATH = "token"
TITLE = "Token"
SECTION = "Inspect"

ORDERS = {
    "n": ("count", "number of times that it fires on the token"),
    "p_fire_given_token": ("P(fires|token)", "share of the token's occurrences on which it fires"),
    "p_token_given_fire": ("P(token|fires)", "share of its activations that are on the token"),
    "lift": ("lift", "P(fires|token) divided by its activation density"),
}
FOUND_SHOWN = 50
EXAMPLES_SHOWN = 10
WINDOW = 16
"""Tokens on each side of one, in the examples."""


@dataclass(frozen=True, kw_only=True)
class Asked(Query):
    """The parameters of this page."""

    t: str = parameter("", Text())
    """A token, part of one, or # and its id."""
    by: str = parameter("specificity", Choice(tuple(ORDERS)))
    f: int | None = parameter(None, Whole())
    """The feature whose examples are shown."""


def show(here: Here) -> None:
    asked = here.read(Asked)
    st.title("Token")
    if not here.store.has("token_feature"):
        reason = here.store.info()["missing"].get("token_feature", "the store was indexed without it")
        notice(f"This page needs the tokens of the text: {reason.rstrip('.')}.", key="no-tokens")
        return
    _search(here, asked.t)
    if not asked.t:
        notice(
            "Enter a token or part of one. Most tokens begin with a space; #12 is the token with id 12.",
            key="empty",
        )
        _found(here, here.store.find_tokens(limit=FOUND_SHOWN), "The most frequent tokens")
        return
    token, others = _find(here, asked.t)
    if token is not None:
        _token(here, asked, token)
    if len(others):
        _found(here, others, "Tokens that contain it")
    elif token is None:
        notice(
            f"No token is or contains {visible(asked.t, spaces='edges')}. A word may be several tokens: "
            "try a part of it.",
            key="none",
        )


def _search(here: Here, wanted: str) -> None:
    st.session_state["token_text"] = wanted

    def apply() -> None:
        text = st.session_state["token_text"]
        here.show(here.view, Asked(t=text))

    st.text_input("Token text or #id", key="token_text", on_change=apply, width=340, placeholder=" the")


def _find(here: Here, wanted: str) -> tuple[dict[str, Any] | None, pd.DataFrame]:
    """The token that was asked for, and others whose text contains the search."""
    store = here.store
    id_ = _whole(wanted[1:]) if wanted.startswith("#") else None
    exact = store.find_tokens(token=wanted)
    if exact.empty and id_ is not None:
        exact, others = store.find_tokens(token=id_), exact
    else:
        others = store.find_tokens(wanted, limit=FOUND_SHOWN)
    if exact.empty:
        return None, others
    token = exact.iloc[0].to_dict()
    return token, others[others["token"] != token["token"]]


def _whole(text: str) -> int | None:
    try:
        return Whole().read(text)
    except ValueError:
        return None


def _token(here: Here, asked: Asked, token: dict[str, Any]) -> None:
    n_tokens = here.store.info()["n_tokens"]
    text, id_ = visible(token["text"], spaces="edges"), int(token["token"])
    tiles = [
        Statistic("Token", text, f"id {id_}"),
        Statistic("Count", count(token["n"]), "occurrences in the text", int(token["n"])),
        Statistic("Frequency", share(token["n"] / n_tokens), "of all tokens", token["n"] / n_tokens),
    ]
    statistics(tiles, key="token-statistics")
    found = here.store.features_on(id_, order_by=asked.by)
    if found.empty:
        notice("The store lists no feature that fires on this token.", key="inactive")
        return
    known = describe(here.store, found["feature"].tolist())
    left, right = st.columns([11, 9], gap="medium")
    with left:
        st.subheader(
            "Features that fire on it",
            help="Up to 32 features that fire on this token often, and on others less.",
        )
        _features(here, asked, found, known)
    with right:
        _examples(here, asked, id_, found, known)


def _features(here: Here, asked: Asked, found: pd.DataFrame, known: dict[int, Described]) -> None:
    def heading(column: str) -> Heading:
        label, help_ = ORDERS[column]
        href = here.view.url(PATH, replace(asked, by=column, f=None))
        return Heading(label, help=help_, href=href, sorted="descending" if column == asked.by else "")

    rows = [
        [
            Cell(str(row["feature"]), exact=row["feature"], href=here.view.url("feature", f=row["feature"])),
            Cell(count(row["n"]), exact=row["n"]),
            *(
                Cell(share(row[name]), exact=row[name], bar=row[name])
                for name in ("p_fire_given_token", "p_token_given_fire")
            ),
            Cell(number(row["lift"]), exact=row["lift"]),
            Cell(known[row["feature"]].words, kind="words"),
        ]
        for row in found.to_dict("records")
    ]
    headings = [
        Heading("feature", align="left"),
        *map(heading, ORDERS),
        Heading("name", align="left", help="its label, explanation, or top token"),
    ]
    table(headings, rows, name="Features that fire on it", key="features-on", height="calc(100vh - 24rem)")


def _examples(here: Here, asked: Asked, token: int, found: pd.DataFrame, known: dict[int, Described]) -> None:
    st.subheader("Examples on this token")
    if not here.store.has("context"):
        notice("The store has no contexts to show.", key="no-context")
        return
    features = found["feature"].tolist()
    st.session_state["token_feature"] = asked.f if asked.f in features else features[0]

    def apply() -> None:
        here.show(here.view, replace(asked, f=st.session_state["token_feature"]))

    feature = st.selectbox(
        "Feature",
        features,
        key="token_feature",
        on_change=apply,
        label_visibility="collapsed",
        format_func=lambda f: f"{f}  {known[f].words}",
    )
    try:
        rows = here.store.examples_on(feature, token, n=EXAMPLES_SHOWN)
    except UserError as error:
        notice(str(error), key="no-examples", kind="error")
        return
    examples(
        rows.to_dict("records"),
        scale=known[feature].max_act,
        window=WINDOW,
        key="examples",
        place=lambda row: here.view.url("context", c=row["ctx"], f1=feature, pos=row["pos"]),
    )
    st.caption(f"The largest activations of feature {feature} on this token, at most {EXAMPLES_SHOWN}.")


def _found(here: Here, found: pd.DataFrame, title: str) -> None:
    st.subheader(title)
    rows = [
        [
            Cell(
                str(row["token"]), exact=row["token"], href=here.view.url(PATH, Asked(t=f"#{row['token']}"))
            ),
            Cell(visible(row["text"], spaces="edges"), kind="token"),
            Cell(count(row["n"]), exact=row["n"]),
        ]
        for row in found.to_dict("records")
    ]
    headings = [
        Heading("id", align="left"),
        Heading("token", align="left"),
        Heading("count", help="occurrences in the store's text"),
    ]
    table(headings, rows, name=title, key="found")
