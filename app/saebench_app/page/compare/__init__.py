"""Compare: two SAEs of the store side by side, the features they share, and a pair of features.

A crosscoder compares what it was trained on: which of its features several sites or models share.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import streamlit as st

from saebench.analysis import figures
from saebench.core.formatting import ABSENT, count, is_absent, number, share, visible
from saebench.store.query import FeatureStore
from saebench_app.components.notice import notice
from saebench_app.components.plot import plot
from saebench_app.components.statistics import Statistic, statistics
from saebench_app.components.table import Cell, Heading, table
from saebench_app.components.working import working
from saebench_app.page.compare.comparison import SIDES, THRESHOLD, WAYS, Comparison, frames_of, match_task
from saebench_app.page.compare.pair import pair, pick
from saebench_app.page.compare.sites import show_sites
from saebench_app.page.overview import compared
from saebench_app.session import Here, open_session_store
from saebench_app.work import Found, found

if TYPE_CHECKING:
    from saebench.analysis.matching import Matching

PATH = "compare"
TITLE = "Compare"
SECTION = "Compare"
PER_PAGE = 50
MEASURES = {
    "sae": "architecture",
    "d_sae": "features",
    "k": "k",
    "l0": "L0",
    "dead": "dead",
    "dense": "dense",
    "median_density": "median density",
    "explained_variance": "explained variance",
    "ce_loss_score": "CE score",
    "kl": "KL",
}
SHARES = ("dead", "dense", "median_density")


def show(here: Here) -> None:
    st.title("Compare")
    saes = here.store.saes
    crosscoder = here.store.has("crosscoder")
    if crosscoder:
        show_sites(here)
    if len(saes) < 2 and crosscoder:
        return
    if len(saes) < 2:
        notice(
            f"The store has one SAE. A second one, of another seed, width or architecture, is added with "
            f"saebench index RUN --cache CACHE --out {here.store.path}.",
            key="empty",
        )
        return
    this = Comparison.of(here)
    _choose(here, this)
    if this.a == this.b:
        notice("These are the same SAE. Select another one for b.", key="same")
        return
    a, b = open_session_store(this.a), open_session_store(this.b)
    left, right = st.columns([9, 11], gap="medium")
    with left:
        _side_by_side(here, this)
    with right:
        result = _matching(here, this, a, b)
    if this.fa is not None or this.fb is not None:
        pair(here, this, a, b)
    else:
        pick(here, this, a)
    if result is not None:
        _list(here, this, a, b, result)


def _choose(here: Here, this: Comparison) -> None:
    st.session_state.update({"a": this.a, "b": this.b})

    def apply() -> None:
        chosen = Comparison(a=st.session_state["a"], b=st.session_state["b"], by=this.by)
        here.show(here.view, chosen)

    def swap() -> None:
        here.show(here.view, replace(this, a=this.b, b=this.a, fa=this.fb, fb=this.fa, at=1))

    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.selectbox("SAE a", here.store.saes, key="a", on_change=apply, width=220)
        st.button("Swap", on_click=swap, icon=":material/swap_horiz:", type="tertiary")
        st.selectbox("SAE b", here.store.saes, key="b", on_change=apply, width=220)


def _side_by_side(here: Here, this: Comparison) -> None:
    st.subheader("Side by side")
    frame = compared(here.store).set_index("name", drop=False)
    one, other = frame.loc[this.a], frame.loc[this.b]
    headings = [Heading("measure", align="left"), Heading(this.a), Heading(this.b)]
    rows = [
        [Cell(label), *(_measure(name, side[name]) for side in (one, other))]
        for name, label in MEASURES.items()
    ]
    table(headings, rows, name="Side by side", key="side-by-side")


def _measure(name: str, value: Any) -> Cell:
    if is_absent(value):
        return Cell(ABSENT)
    if name == "sae":
        return Cell(str(value))
    if name in ("d_sae", "k"):
        return Cell(count(value), exact=int(value))
    return Cell(share(value) if name in SHARES else number(value), exact=float(value))


def _matching(here: Here, this: Comparison, a: FeatureStore, b: FeatureStore) -> Found | None:
    st.subheader(
        "Shared features",
        help="Features of the two SAEs are paired one to one so that the sum of similarities is largest. "
        f"Stability: the share of the pairs with a similarity of at least {THRESHOLD}.",
    )
    st.session_state["by"] = this.by
    st.segmented_control(
        "Matched by",
        list(WAYS),
        format_func=WAYS.__getitem__,
        key="by",
        required=True,
        label_visibility="collapsed",
        on_change=lambda: here.show(here.view, replace(this, by=st.session_state["by"], at=1)),
    )
    task = match_task(this, a, b)
    if task is None:
        notice(
            "Matching all features needs the runs of both SAEs, since a store keeps no weights: start the "
            f"explorer as saebench explore {here.store.path} --run RUN_A --run RUN_B. Without them, features "
            "can be compared one by one below.",
            key="no-run",
        )
        return None
    result = found(task)
    if result is None:
        n, m = a.info()["d_sae"], b.info()["d_sae"]
        working(task, "Match the features", note=f"{n:,} with {m:,}")
        return None
    pairs, unmatched = result.tables["pairs"], result.tables["unmatched"]
    facts, alone = result.facts, unmatched["side"].value_counts()
    tiles = [
        Statistic("Pairs", count(len(pairs)), exact=len(pairs)),
        Statistic("Mean similarity", number(facts["mean_similarity"]), exact=facts["mean_similarity"]),
        Statistic(
            "Stability", share(facts["stability"]), f"at least {facts['threshold']:g}", facts["stability"]
        ),
        *(
            Statistic(f"Only in {side}", count(n), "unmatched", n)
            for side in "ab"
            if (n := int(alone.get(side, 0)))
        ),
    ]
    if "splits" in result.tables:
        n = int(result.tables["splits"]["feature_a"].nunique())
        tiles.append(
            Statistic(
                "Splits",
                count(n),
                f"of {facts['narrow']}",
                n,
                "features that split into several features of the other SAE",
            )
        )
    statistics(tiles, key="matching")
    _similarities(result)
    return result


def _similarities(result: Found) -> None:
    facts = {name: result.facts[name] for name in ("by", "threshold", "mean_similarity", "stability")}
    # As `match` gave it; its own class would load torch into the server.
    matching = cast("Matching", SimpleNamespace(pairs=result.tables["pairs"], **facts))
    alt = f"Similarity of {len(matching.pairs):,} pairs; {share(facts['stability'])} reach the threshold"
    plot(figures.matching_similarity(matching), key="similarities", alt=alt, height=210)


def _list(here: Here, this: Comparison, a: FeatureStore, b: FeatureStore, result: Found) -> None:
    frames = frames_of(result)
    sides = [side for side in SIDES if side in frames and (len(frames[side]) or side == "pairs")]
    side = this.side if this.side in sides else "pairs"
    st.subheader("All pairs" if side == "pairs" else SIDES[side].capitalize())
    if len(sides) > 1:
        st.session_state["side"] = side
        st.segmented_control(
            "Which",
            sides,
            key="side",
            required=True,
            label_visibility="collapsed",
            format_func=lambda name: f"{SIDES[name]} ({len(frames[name]):,})",
            on_change=lambda: here.show(here.view, replace(this, side=st.session_state["side"], at=1)),
        )
    frame = frames[side].sort_values([this.rank, "a"], ascending=[this.ascending(), True], kind="stable")
    last = max(1, math.ceil(len(frame) / PER_PAGE))
    page = min(this.at, last)
    shown = frame.iloc[(page - 1) * PER_PAGE : page * PER_PAGE]
    columns = ["feature", "density", *(["top_token"] if a.has("token") and b.has("token") else [])]
    about = {}
    for name, store in (("a", a), ("b", b)):
        known = store.features(columns, among=sorted(set(shown[name].tolist())))
        about[name] = known.set_index("feature").to_dict("index")
    headings = [
        _heading(here, this, "similarity", "similarity"),
        _heading(here, this, "a", this.a),
        Heading("top token", align="left"),
        Heading("density"),
        _heading(here, this, "b", this.b),
        Heading("top token", align="left"),
        Heading("density"),
    ]
    rows = [_row(here, this, row, about) for row in shown.to_dict("records")]
    table(headings, rows, name="Pairs", key="pairs", height="30rem")
    with st.container(horizontal=True, vertical_alignment="center"):
        st.caption(
            f"{(page - 1) * PER_PAGE + 1:,} to {min(page * PER_PAGE, len(frame)):,} of {len(frame):,}",
            width="content",
        )
        if last > 1:
            st.session_state["at"] = page
            st.pagination(
                last,
                key="at",
                on_change=lambda: here.show(here.view, replace(this, at=st.session_state["at"])),
            )


def _heading(here: Here, this: Comparison, column: str, label: str) -> Heading:
    turned = not this.turned if column == this.rank else False
    return Heading(
        label,
        href=here.view.url(PATH, replace(this, rank=column, turned=turned, at=1)),
        sorted=("ascending" if this.ascending() else "descending") if column == this.rank else "",
    )


def _row(here: Here, this: Comparison, row: dict[str, Any], about: dict[str, dict[int, Any]]) -> list[Cell]:
    fa, fb = int(row["a"]), int(row["b"])
    href = here.view.url(PATH, replace(this, fa=fa, fb=fb))
    value = float(row["similarity"])
    cells = [Cell(number(value), exact=value, bar=max(value, 0), href=href)]
    for feature, of in ((fa, about["a"]), (fb, about["b"])):
        known = of.get(feature, {})
        token = known.get("top_token")
        cells += [
            Cell(str(feature), exact=feature),
            Cell(
                "" if is_absent(token) else visible(token, spaces="edges"),
                kind="" if is_absent(token) else "token",
            ),
            Cell(share(known.get("density")), exact=known.get("density")),
        ]
    return cells
