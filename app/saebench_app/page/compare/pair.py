"""A feature of one SAE beside one of another: examples of both, and features that fire on the same tokens."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import streamlit as st

from saebench.core.errors import UserError
from saebench.core.formatting import ABSENT, count, number, share, visible
from saebench.store.query import FeatureStore
from saebench_app.components.notice import notice
from saebench_app.components.statistics import Statistic, statistics
from saebench_app.components.table import Cell, Heading, table, token_cell
from saebench_app.components.tokens import examples
from saebench_app.page.compare.comparison import Comparison
from saebench_app.session import Here
from saebench_app.view import View

PATH = "compare"
EXAMPLES = 5
COUNTERPARTS = 8


def pick(here: Here, this: Comparison, a: FeatureStore) -> None:
    st.subheader("Two features side by side")
    st.number_input(
        f"Feature of {this.a}",
        0,
        a.info()["d_sae"] - 1,
        value=None,
        key="fa",
        width=220,
        placeholder="number",
        help="Its counterparts are the features of the other SAE that fire on the same tokens.",
        on_change=lambda: here.show(here.view, replace(this, fa=st.session_state["fa"])),
    )


def pair(here: Here, this: Comparison, a: FeatureStore, b: FeatureStore) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        st.subheader("Two features side by side", width="content")
        st.button(
            "Close", type="tertiary", on_click=here.show, args=(here.view, replace(this, fa=None, fb=None))
        )
    firings_of_a = None if this.fa is None else _firings(a, this.fa, this.b)
    firings_of_b = None if this.fb is None else _firings(b, this.fb, this.a)
    fa = this.fa if this.fa is not None else _best(firings_of_b)
    fb = this.fb if this.fb is not None else _best(firings_of_a)
    for side, column, store, feature in zip("ab", st.columns(2, gap="medium"), (a, b), (fa, fb), strict=True):
        with column:
            _one(here, this, side, store, feature)
    for one, firings in (("a", firings_of_a), ("b", firings_of_b)):
        if firings is not None and (one == "a" or this.fa is None):
            _counterparts(here, this, one, firings)


@st.cache_data(
    max_entries=64,
    show_spinner="Searching for features that fire on the same tokens",
    hash_funcs={FeatureStore: lambda store: (str(store.path), store.sae, store.generation)},
)
def _firings(store: FeatureStore, feature: int, other: str) -> pd.DataFrame | str:
    """Features of ``other`` that fire where this one does, or why they are not known."""
    try:
        return store.same_firings(feature, other, limit=COUNTERPARTS)
    except UserError as error:
        return str(error)


def _best(firings: pd.DataFrame | str | None) -> int | None:
    return int(firings["feature"].iloc[0]) if isinstance(firings, pd.DataFrame) and len(firings) else None


def _one(here: Here, this: Comparison, side: str, store: FeatureStore, feature: int | None) -> None:
    sae = this.a if side == "a" else this.b
    key = f"f{side}"
    st.session_state[key] = feature
    st.number_input(
        f"Feature of {sae}",
        0,
        store.info()["d_sae"] - 1,
        value=None,
        key=key,
        width=220,
        on_change=lambda: here.show(here.view, this.with_feature(side, st.session_state[key])),
    )
    if feature is None:
        notice(f"No feature of {sae} fires on the same tokens.", key=f"none-{side}")
        return
    row = store.feature(feature)
    st.page_link(
        here.pages["feature"],
        label=f"Feature {feature} of {sae}",
        query_params=View(sae=sae).query(f=feature),
    )
    token = row["top_token"]
    tiles = [
        Statistic("Density", share(row["density"]), exact=row["density"]),
        Statistic("Max activation", number(row["max_act"]), exact=row["max_act"]),
        Statistic("Top token", ABSENT if token is None else visible(token, spaces="edges")),
    ]
    statistics(tiles, key=f"one-{side}", small=True)
    if row.get("explanation"):
        notice(visible(row["explanation"]), key=f"explanation-{side}")
    if not store.has("context"):
        notice("The store has no text, so there are no examples.", key=f"no-text-{side}")
    elif row["dead"]:
        notice("It fires on no token of the indexed text.", key=f"dead-{side}")
    else:
        shown = store.examples(feature, group="top").head(EXAMPLES).to_dict("records")
        examples(shown, scale=row["max_act"], window=12, key=f"examples-{side}")


def _counterparts(here: Here, this: Comparison, side: str, firings: pd.DataFrame | str) -> None:
    own, other = (this.a, this.b) if side == "a" else (this.b, this.a)
    feature = this.fa if side == "a" else this.fb
    if isinstance(firings, str):
        notice(f"{firings[:1].upper()}{firings[1:].rstrip('.')}.", key=f"why-{side}", kind="error")
        return
    st.markdown(f"**Features that fire where feature {feature} fires**")
    if not len(firings):
        notice("No feature fires there.", key=f"nothing-{side}")
        return
    target = "b" if side == "a" else "a"
    headings = [
        Heading("feature", align="left", help=f"of {other}"),
        Heading("top token", align="left"),
        Heading("both", help="tokens on which both fire"),
        Heading(
            f"of {feature}", help=f"share of the activations of {own} {feature} at which it fires as well"
        ),
        Heading("of its own", help=f"share of its own activations at which {own} {feature} fires as well"),
        Heading("Jaccard", help="tokens on which both fire, as a share of those on which either fires"),
    ]
    rows = [
        [
            Cell(
                str(row["feature"]),
                exact=int(row["feature"]),
                href=here.view.url(PATH, this.with_feature(target, int(row["feature"]))),
            ),
            token_cell(row["top_token"]),
            Cell(count(row["n_both"]), exact=int(row["n_both"])),
            Cell(share(row["p_other_given_this"]), exact=float(row["p_other_given_this"])),
            Cell(share(row["p_this_given_other"]), exact=float(row["p_this_given_other"])),
            Cell(number(row["jaccard"]), exact=float(row["jaccard"]), bar=float(row["jaccard"])),
        ]
        for row in firings.to_dict("records")
    ]
    table(headings, rows, name=f"Features that fire where feature {feature} fires", key=f"firings-{side}")
