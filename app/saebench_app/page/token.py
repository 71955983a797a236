"""Token: which features fire on one token, and where."""

from __future__ import annotations

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
from saebench_app.view import whole

if TYPE_CHECKING:
    import pandas as pd

PATH = "token"
TITLE = "Token"
SECTION = "Ask"

ORDERS = {
    "n": ("times", "how often it fires on the token"),
    "p_fire_given_token": ("P(fires|token)", "share of the token's occurrences on which it fires"),
    "p_token_given_fire": ("P(token|fires)", "share of its firings that fall on the token"),
    "lift": ("lift", "how many times as often it fires here as on a token drawn at random"),
}
FOUND_SHOWN = 50
EXAMPLES_SHOWN = 10
WINDOW = 16
"""Tokens on each side of one, in the examples."""


def show(here: Here) -> None:
    params = st.query_params.to_dict()
    wanted = params.get("t", "")
    by = params["by"] if params.get("by") in ORDERS else "specificity"
    st.title("Token")
    if not here.store.has("token_feature"):
        reason = here.store.info()["missing"].get("token_feature", "the store was indexed without it")
        notice(f"This page needs the tokens of the text: {reason.rstrip('.')}.", key="no-tokens")
        return
    _search(here, wanted)
    if not wanted:
        notice("Write a token above, or a part of one. Most tokens begin with a space; #12 is token 12.",
               key="empty")  # fmt: skip
        _found(here, here.store.find_tokens(limit=FOUND_SHOWN), "The most frequent tokens")
        return
    token, others = _find(here, wanted)
    if token is not None:
        _token(here, wanted, token, by)
    if len(others):
        _found(here, others, "Tokens that contain it")
    elif token is None:
        notice(
            f"No token is or contains {visible(wanted, spaces='edges')}. A word may be several tokens: "
            "try a part of it.", key="none",
        )  # fmt: skip


def _search(here: Here, wanted: str) -> None:
    st.session_state["token_text"] = wanted

    def apply() -> None:
        text = st.session_state["token_text"]
        here.show(here.view, **({"t": text} if text else {}))

    st.text_input(
        "Text, or #number of a token", key="token_text", on_change=apply, width=340, placeholder=" the"
    )


def _find(here: Here, wanted: str) -> tuple[dict[str, Any] | None, pd.DataFrame]:
    """The token that is meant, and others whose text contains what was written."""
    store = here.store
    number_ = whole(wanted[1:]) if wanted.startswith("#") else None
    exact = store.find_tokens(token=wanted)
    if exact.empty and number_ is not None:
        exact, others = store.find_tokens(token=number_), exact
    else:
        others = store.find_tokens(wanted, limit=FOUND_SHOWN)
    if exact.empty:
        return None, others
    token = exact.iloc[0].to_dict()
    return token, others[others["token"] != token["token"]]


def _token(here: Here, wanted: str, token: dict[str, Any], by: str) -> None:
    n_tokens = here.store.info()["n_tokens"]
    text, id_ = visible(token["text"], spaces="edges"), int(token["token"])
    tiles = [
        Statistic("Token", text, f"number {id_}"),
        Statistic("Occurs", count(token["n"]), "times in the text", int(token["n"])),
        Statistic("Share", share(token["n"] / n_tokens), "of all tokens", token["n"] / n_tokens),
    ]
    statistics(tiles, key="token-statistics")
    found = here.store.features_on(id_, order_by=by)
    if found.empty:
        notice("The store lists no feature that fires on this token.", key="silent")
        return
    known = describe(here.store, found["feature"].tolist())
    left, right = st.columns([11, 9], gap="medium")
    with left:
        st.subheader(
            "Features that fire on it", help="Up to 32: those that fire on it often, and on others less."
        )
        _features(here, wanted, found, known, by)
    with right:
        _examples(here, id_, found, known)


def _features(here: Here, wanted: str, found: pd.DataFrame, known: dict[int, Described], by: str) -> None:
    def heading(column: str) -> Heading:
        label, help_ = ORDERS[column]
        href = here.view.url(PATH, t=wanted, by=column)
        return Heading(label, help=help_, href=href, sorted="descending" if column == by else "")

    rows = [
        [
            Cell(str(row["feature"]), exact=row["feature"], href=here.view.url("feature", f=row["feature"])),
            Cell(count(row["n"]), exact=row["n"]),
            *(Cell(share(row[name]), exact=row[name], bar=row[name])
              for name in ("p_fire_given_token", "p_token_given_fire")),
            Cell(number(row["lift"]), exact=row["lift"]),
            Cell(known[row["feature"]].words, kind="words"),
        ]
        for row in found.to_dict("records")
    ]  # fmt: skip
    headings = [
        Heading("feature", align="left"), *map(heading, ORDERS), Heading("what it is", align="left"),
    ]  # fmt: skip
    table(headings, rows, name="Features that fire on it", key="features-on", height="calc(100vh - 24rem)")


def _examples(here: Here, token: int, found: pd.DataFrame, known: dict[int, Described]) -> None:
    st.subheader("Where one of them fires on it")
    if not here.store.has("context"):
        notice("The store has no contexts to show.", key="no-context")
        return
    features = found["feature"].tolist()
    asked = here.feature()
    st.session_state["token_feature"] = asked if asked in features else features[0]
    params = {name: value for name, value in st.query_params.to_dict().items() if name in ("t", "by")}

    def apply() -> None:
        here.show(here.view, **params, f=st.session_state["token_feature"])

    feature = st.selectbox(
        "Feature", features, key="token_feature", on_change=apply, label_visibility="collapsed",
        format_func=lambda f: f"{f}  {known[f].words}",
    )  # fmt: skip
    try:
        rows = here.store.examples_on(feature, token, n=EXAMPLES_SHOWN)
    except UserError as error:
        notice(str(error), key="no-examples", kind="error")
        return
    examples(
        rows.to_dict("records"), scale=known[feature].max_act, window=WINDOW, key="examples",
        place=lambda row: here.view.url("context", c=row["ctx"], f1=feature, pos=row["pos"]),
    )  # fmt: skip
    st.caption(
        f"Where feature {feature} fires hardest on this token. The store has no index of all its places."
    )


def _found(here: Here, found: pd.DataFrame, title: str) -> None:
    st.subheader(title)
    rows = [
        [
            Cell(str(row["token"]), exact=row["token"], href=here.view.url(PATH, t=f"#{row['token']}")),
            Cell(visible(row["text"], spaces="edges"), kind="token"),
            Cell(count(row["n"]), exact=row["n"]),
        ]
        for row in found.to_dict("records")
    ]
    headings = [
        Heading("number", align="left"), Heading("token", align="left"),
        Heading("occurs", help="rows of the store's text with this token"),
    ]  # fmt: skip
    table(headings, rows, name=title, key="found")
