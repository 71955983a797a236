"""Which features fire on one text: a grid of features by tokens, and a table of those on one token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import streamlit as st

from saebench.core.formatting import number, share, visible
from saebench_app.answers import Reading, attribute
from saebench_app.components import CONTROL_WIDTH
from saebench_app.components.heat import Row, heat
from saebench_app.components.notice import notice
from saebench_app.components.passage import Lane, passage
from saebench_app.components.table import Cell, Heading, table
from saebench_app.described import Described
from saebench_app.page.prompt.query import MEASURES, Prompt
from saebench_app.session import Here

if TYPE_CHECKING:
    import pandas as pd

PATH = "prompt"
ROWS = 24
"""Features on the grid, and in the tables."""


def show_tokens(
    here: Here,
    asked: Prompt,
    reading: Reading,
    at: int,
    known: Mapping[int, Described],
    *,
    second: bool = False,
) -> None:
    lanes = []
    if asked.f is not None and asked.f in known:
        one = known[asked.f]
        acts = _activations(reading, one.feature)
        page = here.view.url("feature", f=one.feature)
        steer = here.view.url("steer", f=one.feature, text=asked.text2 if second else asked.text)
        links = [
            ("steer", steer, f"Steer feature {one.feature} on this text"),
            ("clear", url(here, replace(asked, f=None)), "Show the text alone"),
        ]
        scale = one.max_act or max(map(abs, acts))
        lanes = [Lane(acts, scale, f"Feature {one.feature}", page, one.words, links)]
    passage(
        reading.pieces,
        lanes,
        name="Second text" if second else "Tokens of the text",
        tall=True,
        key="passage2" if second else "passage",
        link="" if asked.text2 else url(here, replace(asked, at=None)) + "&at=",
        current=None if asked.text2 else at,
    )


def show_controls(here: Here, asked: Prompt) -> None:
    lowest = -float(math.ceil(math.log10(max(here.store.info()["n_tokens"], 10))))
    st.session_state.update(
        {
            "prompt_by": asked.by,
            "prompt_cut": min(max(asked.cut, lowest), 0.0),
            "prompt_bos": asked.bos,
            "prompt_target": asked.target,
        }
    )

    def apply() -> None:
        chosen = {name: st.session_state.get(f"prompt_{name}", "") for name in ("by", "cut", "bos", "target")}
        here.show(here.view, replace(asked, **chosen | {"cut": round(chosen["cut"], 1)}))

    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        if not asked.text2:
            st.segmented_control(
                "Sort features by",
                tuple(MEASURES),
                format_func=lambda name: MEASURES[name][0],
                key="prompt_by",
                on_change=apply,
                required=True,
            )
        if asked.by == "attribution" and not asked.text2:
            st.text_input(
                "Target token",
                key="prompt_target",
                on_change=apply,
                width=CONTROL_WIDTH,
                placeholder="predicted token",
                help="One token, with its leading space if it has one. "
                "Empty: the token that the model predicts after the selected token.",
            )
        st.slider(
            "Density limit (log10)",
            lowest,
            0.0,
            step=0.1,
            format="%.1f",
            key="prompt_cut",
            on_change=apply,
            width=CONTROL_WIDTH,
            help="Features with a higher activation density in the store are left out; -1 is "
            "10% of the tokens.",
        )
        st.toggle(
            "Include position 0",
            key="prompt_bos",
            on_change=apply,
            help="In most models, activations at position 0 are far larger than elsewhere.",
        )


def show_grid(
    here: Here,
    asked: Prompt,
    reading: Reading,
    at: int,
    listed: list[int],
    sizes: Mapping[int, float],
    known: Mapping[int, Described],
) -> None:
    fires = reading.fires
    fires = fires if asked.bos else fires[~fires["first"]]
    cells = {feature: group for feature, group in fires[fires["feature"].isin(listed)].groupby("feature")}
    rows = []
    for feature in listed:
        at_pos = {} if (found := cells.get(feature)) is None else found.set_index("pos")["value"].to_dict()
        pins = tuple(one for one in asked.pin if one != feature)
        pinned = feature in asked.pinned(here)
        other = replace(asked, pin=pins, f=None if asked.f == feature else asked.f)
        rows.append(
            Row(
                feature,
                at_pos,
                sizes.get(feature, 0.0),
                known[feature].words,
                here.view.url("feature", f=feature, text=asked.text),
                url(here, other if pinned else replace(asked, pin=(*asked.pin, feature))),
                pinned,
            )
        )
    label, help_ = MEASURES[asked.by]
    heat(
        [(pos, piece) for pos, piece in enumerate(reading.pieces) if pos or asked.bos],
        rows,
        name="Features by tokens",
        key="heat",
        measure=label,
        help=help_,
        current=at,
        feature=asked.f,
        link=url(here, replace(asked, f=None, at=None)),
        at=url(here, replace(asked, at=None)),
    )


def show_at_token(
    here: Here, asked: Prompt, reading: Reading, at: int, known: Mapping[int, Described]
) -> None:
    st.subheader("On the selected token")
    fires = reading.fires[reading.fires["pos"] == at].head(ROWS)
    fires = fires.loc[[is_sparse(known[feature], asked) for feature in fires["feature"]]]
    token = visible(reading.pieces[at], spaces="edges")
    passage([reading.pieces[at]], name=f"The token at position {at}", key="chosen")
    if fires.empty:
        notice(f"No feature fires on {token}.", key="inactive")
        return
    largest = float(fires["value"].abs().max())
    rows = [
        [
            Cell(str(feature), exact=feature, href=url(here, replace(asked, f=feature, at=at))),
            Cell(number(value), exact=value, bar=abs(value) / largest, kind="" if value >= 0 else "cold"),
            Cell(share(known[feature].density), exact=known[feature].density),
            Cell(known[feature].words, kind="words"),
        ]
        for feature, value in zip(fires["feature"].tolist(), fires["value"].tolist(), strict=True)
    ]
    headings = [
        Heading("feature", align="left"),
        Heading("activation"),
        Heading("density", help="share of the store's tokens on which it fires"),
        Heading("name", align="left", help="its label, explanation, or top token"),
    ]
    table(headings, rows, name="Features on the selected token", key="token", height="28rem")


def counted(fires: pd.DataFrame, asked: Prompt, known: Mapping[int, Described]) -> pd.DataFrame:
    """The activations that features are sorted by: without position 0, unless it is included, and without
    features above the density limit."""
    kept = fires if asked.bos else fires[~fires["first"]]
    return kept.loc[[is_sparse(known[feature], asked) for feature in kept["feature"]]]


def is_sparse(one: Described, asked: Prompt) -> bool:
    """Whether a feature is within the density limit."""
    return asked.cut >= 0 or one.density <= 10**asked.cut


def sizes_of(here: Here, asked: Prompt, fires: pd.DataFrame, at: int) -> dict[int, float]:
    """Feature -> the value that it is sorted by, in order."""
    if asked.by == "attribution":
        found = attribute(here, asked.text, position=at, target=asked.target, keep_first=asked.bos or at == 0)
        target = visible(found.target, spaces="edges")
        why = "" if asked.target else ", which the model predicts"
        notice(f"Effects on the logit of {target} after the selected token{why}.", key="target")
        sums = found.latents.groupby("feature")["attribution"].sum()
        sums = sums[sums.index.isin(fires["feature"])].sort_values(key=abs, ascending=False, kind="stable")
        return dict(zip(sums.index.tolist(), sums.tolist(), strict=True))
    if asked.by == "at":
        fires = fires[fires["pos"] == at]
    values = fires.groupby("feature")["value"]
    sizes = values.sum() if asked.by == "sum" else values.max()
    sizes = sizes.sort_values(ascending=False, kind="stable")
    return dict(zip(sizes.index.tolist(), sizes.tolist(), strict=True))


def _activations(reading: Reading, feature: int) -> list[float]:
    """The feature's value on each token."""
    acts = [0.0] * len(reading.pieces)
    found = reading.fires[reading.fires["feature"] == feature]
    for pos, value in zip(found["pos"].tolist(), found["value"].tolist(), strict=True):
        acts[pos] = value
    return acts


def url(here: Here, asked: Prompt) -> str:
    """A link to this page."""
    return here.view.url(PATH, asked)
