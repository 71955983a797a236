"""Prompt: which features fire on a text of one's own, and how two texts differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import streamlit as st

from saebench.core.formatting import number, share, visible
from saebench_app.answers import Reading, attribute, compare, read
from saebench_app.asked import LONGEST, MEASURES, Prompt
from saebench_app.components.filters import WIDTH
from saebench_app.components.heat import Row, heat
from saebench_app.components.notice import notice
from saebench_app.components.passage import Lane, passage
from saebench_app.components.table import Cell, Heading, table
from saebench_app.described import Described, describe
from saebench_app.runs import run_of, why_no_run
from saebench_app.session import Here

if TYPE_CHECKING:
    import pandas as pd

PATH = "prompt"
TITLE = "Prompt"
SECTION = "Ask"

ROWS = 24
"""Features on the grid, and in the tables."""
NAMES = {
    "max": ("largest", "largest activation on the text"),
    "sum": ("sum", "sum of its activations over the text"),
    "at": ("at token", "activation on the chosen token"),
    "attribution": ("attribution", "what it adds to the logit of the predicted token, to first order"),
}
EXAMPLE_TOKENS = 40


def show(here: Here) -> None:
    asked = Prompt.from_query(st.query_params.to_dict())
    st.title("Prompt")
    if run_of(here) is None:
        notice(why_no_run(here), key="no-run")
        return
    _texts(here, asked)
    if not asked.text:
        _begin(here)
        return
    reading = read(here, asked.text)
    last = len(reading.pieces) - 1
    at = last if asked.at is None else min(asked.at, last)
    if asked.text2:
        _two(here, asked, reading, at)
    else:
        _one(here, asked, reading, at)


def _texts(here: Here, asked: Prompt) -> None:
    st.session_state.update({"prompt_text": asked.text, "prompt_text2": asked.text2})
    st.session_state["prompt_two"] = st.session_state.get("prompt_two", False) or bool(asked.text2)

    def apply() -> None:
        text2 = st.session_state.get("prompt_text2", "") if st.session_state["prompt_two"] else ""
        changed = replace(asked, text=st.session_state["prompt_text"], text2=text2)
        same = (changed.text, changed.text2) == (asked.text, asked.text2)
        here.show(here.view, **(changed if same else replace(changed, at=None)).query())

    two = st.session_state["prompt_two"]
    columns = st.columns(2) if two else [st.container()]
    with columns[0]:
        st.text_area("First text" if two else "Text", key="prompt_text", on_change=apply, height=92,
                     max_chars=LONGEST, placeholder="Anything that the model should read")  # fmt: skip
    if two:
        with columns[1]:
            st.text_area("Second text", key="prompt_text2", on_change=apply, height=92, max_chars=LONGEST,
                         placeholder="What it is compared with")  # fmt: skip
    st.toggle("Compare with a second text", key="prompt_two", on_change=apply)


def _begin(here: Here) -> None:
    notice("Write a text above: the model reads it, and its features are shown token by token.", key="empty")
    if here.store.has("context"):
        text = "".join(here.store.context(0)["pieces"][1:EXAMPLE_TOKENS]).strip()
        query = Prompt(text=text[:LONGEST], f=here.feature()).query()
        st.button("Take the beginning of the store's text", on_click=lambda: here.show(here.view, **query))


def _one(here: Here, asked: Prompt, reading: Reading, at: int) -> None:
    known = describe(here.store, [*reading.fires["feature"].tolist(), *_pinned(here, asked)])
    _tokens(here, asked, reading, at, known)
    _controls(here, asked)
    fires = _counted(reading.fires, asked, known)
    sizes = _sizes(here, asked, fires, at)
    pinned = _pinned(here, asked)
    listed = [*pinned, *(feature for feature in sizes if feature not in pinned)][:ROWS]
    left, right = st.columns([15, 8], gap="medium")
    with left:
        st.subheader("Features on the text")
        if not listed:
            notice("Nothing is left to show: let denser features in, or count the first token.", key="none")
        else:
            _grid(here, asked, reading, at, listed, sizes, known)
            total = fires["feature"].nunique()
            st.caption(
                f"{min(len(listed), total):,} of {total:,} features that fire. A cell pins its feature; "
                "a number leads to the feature, the head of a column to its token."
            )
    with right:
        _at_token(here, asked, reading, at, known)


def _tokens(
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
        acts = _acts(reading, one.feature)
        url = here.view.url("feature", f=one.feature)
        steer = here.view.url("steer", f=one.feature, text=asked.text2 if second else asked.text)
        links = [("steer", steer, f"Steer feature {one.feature} on this text"),
                 ("clear", _url(here, replace(asked, f=None)), "Show the text alone")]  # fmt: skip
        scale = one.max_act or max(map(abs, acts))
        lanes = [Lane(acts, scale, f"Feature {one.feature}", url, one.words, links)]
    passage(
        reading.pieces, lanes, name="Second text" if second else "Tokens of the text", tall=True,
        key="passage2" if second else "passage",
        link="" if asked.text2 else _url(here, replace(asked, at=None)) + "&at=",
        current=None if asked.text2 else at,
    )  # fmt: skip


def _controls(here: Here, asked: Prompt) -> None:
    lowest = -float(math.ceil(math.log10(max(here.store.info()["n_tokens"], 10))))
    st.session_state.update(
        {"prompt_by": asked.by, "prompt_cut": min(max(asked.cut, lowest), 0.0), "prompt_bos": asked.bos,
         "prompt_target": asked.target}
    )  # fmt: skip

    def apply() -> None:
        chosen = {name: st.session_state.get(f"prompt_{name}", "") for name in ("by", "cut", "bos", "target")}
        here.show(here.view, **replace(asked, **chosen | {"cut": round(chosen["cut"], 1)}).query())

    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        if not asked.text2:
            st.segmented_control(
                "Sort features by", MEASURES, format_func=lambda name: NAMES[name][0], key="prompt_by",
                on_change=apply, required=True,
            )  # fmt: skip
        if asked.by == "attribution" and not asked.text2:
            st.text_input(
                "To the logit of", key="prompt_target", on_change=apply, width=WIDTH,
                placeholder="its prediction", help="One token, with the space before it if it has one; "
                "empty: the one that the model predicts after the chosen token.",
            )  # fmt: skip
        st.slider(
            "Densest, log10", lowest, 0.0, step=0.1, format="%.1f", key="prompt_cut", on_change=apply,
            width=WIDTH, help="Features that fire on a larger share of the store's tokens are left out; "
            "-1 is a tenth.",
        )  # fmt: skip
        st.toggle("Count the first token", key="prompt_bos", on_change=apply,
                  help="Activations on the first token are out of proportion in most models.")  # fmt: skip


def _grid(
    here: Here, asked: Prompt, reading: Reading, at: int, listed: list[int], sizes: Mapping[int, float],
    known: Mapping[int, Described],
) -> None:  # fmt: skip
    fires = reading.fires
    fires = fires if asked.bos else fires[~fires["first"]]
    cells = {feature: group for feature, group in fires[fires["feature"].isin(listed)].groupby("feature")}
    rows = []
    for feature in listed:
        at_pos = {} if (found := cells.get(feature)) is None else found.set_index("pos")["value"].to_dict()
        pins = tuple(one for one in asked.pin if one != feature)
        pinned = feature in _pinned(here, asked)
        other = replace(asked, pin=pins, f=None if asked.f == feature else asked.f)
        rows.append(
            Row(
                feature,
                at_pos,
                sizes.get(feature, 0.0),
                known[feature].words,
                here.view.url("feature", f=feature, text=asked.text),
                _url(here, other if pinned else replace(asked, pin=(*asked.pin, feature))),
                pinned,
            )
        )
    label, help_ = NAMES[asked.by]
    heat(
        [(pos, piece) for pos, piece in enumerate(reading.pieces) if pos or asked.bos], rows,
        name="Features by tokens", key="heat", measure=label, help=help_, current=at, feature=asked.f,
        link=_url(here, replace(asked, f=None, at=None)), at=_url(here, replace(asked, at=None)),
    )  # fmt: skip


def _at_token(here: Here, asked: Prompt, reading: Reading, at: int, known: Mapping[int, Described]) -> None:
    st.subheader("On the chosen token")
    fires = reading.fires[reading.fires["pos"] == at].head(ROWS)
    fires = fires.loc[[_sparse(known[feature], asked) for feature in fires["feature"]]]
    token = visible(reading.pieces[at], spaces="edges")
    passage([reading.pieces[at]], name=f"The token at position {at}", key="chosen")
    if fires.empty:
        notice(f"No feature fires on {token}.", key="silent")
        return
    largest = float(fires["value"].abs().max())
    rows = [
        [
            Cell(str(feature), exact=feature, href=_url(here, replace(asked, f=feature, at=at))),
            Cell(number(value), exact=value, bar=abs(value) / largest, kind="" if value >= 0 else "cold"),
            Cell(share(known[feature].density), exact=known[feature].density),
            Cell(known[feature].words, kind="words"),
        ]
        for feature, value in zip(fires["feature"].tolist(), fires["value"].tolist(), strict=True)
    ]
    headings = [
        Heading("feature", align="left"), Heading("value"),
        Heading("density", help="share of the store's tokens on which it fires"),
        Heading("what it is", align="left", help="its label, explanation, or most frequent token"),
    ]  # fmt: skip
    table(headings, rows, name="Features on the chosen token", key="token", height="28rem")


def _two(here: Here, asked: Prompt, reading: Reading, at: int) -> None:
    second = read(here, asked.text2)
    changes = compare(here, asked.text, asked.text2, keep_first=asked.bos)
    known = describe(here.store, [*changes["feature"].tolist(), *_pinned(here, asked)])
    left, right = st.columns(2)
    with left:
        _tokens(here, asked, reading, at, known)
    with right:
        _tokens(here, asked, second, at, known, second=True)
    _controls(here, asked)
    st.subheader("What fires otherwise")
    changes = changes.loc[[_sparse(known[feature], asked) for feature in changes["feature"]]].head(ROWS)
    most = float(changes["difference"].abs().max()) if len(changes) else 1.0
    rows = [
        [
            Cell(str(feature), exact=feature, href=_url(here, replace(asked, f=feature))),
            Cell(number(a), exact=a),
            Cell(number(b), exact=b),
            Cell(number(by), exact=by, bar=abs(by) / (most or 1), kind="" if by >= 0 else "cold"),
            Cell(known[feature].words, kind="words"),
        ]
        for feature, a, b, by in zip(
            *(changes[name].tolist() for name in ("feature", "max_a", "max_b", "difference")), strict=True
        )
    ]
    headings = [
        Heading("feature", align="left"), Heading("largest, first"), Heading("largest, second"),
        Heading("difference", help="second minus first"), Heading("what it is", align="left"),
    ]  # fmt: skip
    if rows:
        table(headings, rows, name="What fires otherwise", key="changes")
    else:
        notice("Nothing is left to show: let denser features in.", key="none")


def _pinned(here: Here, asked: Prompt) -> list[int]:
    """The features that are shown first, that of the URL before those that were pinned."""
    d_sae = here.store.info()["d_sae"]
    wanted = [asked.f, *asked.pin] if asked.f is not None else list(asked.pin)
    return list(dict.fromkeys(one for one in wanted if one is not None and one < d_sae))


def _counted(fires: pd.DataFrame, asked: Prompt, known: Mapping[int, Described]) -> pd.DataFrame:
    """What counts where features are sorted: without the first token and too dense ones."""
    kept = fires if asked.bos else fires[~fires["first"]]
    return kept.loc[[_sparse(known[feature], asked) for feature in kept["feature"]]]


def _sparse(one: Described, asked: Prompt) -> bool:
    return asked.cut >= 0 or one.density <= 10**asked.cut


def _sizes(here: Here, asked: Prompt, fires: pd.DataFrame, at: int) -> dict[int, float]:
    """feature -> what it is sorted by, the first one first."""
    if asked.by == "attribution":
        found = attribute(here, asked.text, position=at, target=asked.target, keep_first=asked.bos or at == 0)
        target = visible(found.target, spaces="edges")
        why = "" if asked.target else ", which the model predicts"
        notice(f"Effects on the logit of {target} after the chosen token{why}.", key="target")
        sums = found.latents.groupby("feature")["attribution"].sum()
        sums = sums[sums.index.isin(fires["feature"])].sort_values(key=abs, ascending=False, kind="stable")
        return dict(zip(sums.index.tolist(), sums.tolist(), strict=True))
    if asked.by == "at":
        fires = fires[fires["pos"] == at]
    values = fires.groupby("feature")["value"]
    sizes = values.sum() if asked.by == "sum" else values.max()
    sizes = sizes.sort_values(ascending=False, kind="stable")
    return dict(zip(sizes.index.tolist(), sizes.tolist(), strict=True))


def _acts(reading: Reading, feature: int) -> list[float]:
    """The feature's value on each token."""
    acts = [0.0] * len(reading.pieces)
    found = reading.fires[reading.fires["feature"] == feature]
    for pos, value in zip(found["pos"].tolist(), found["value"].tolist(), strict=True):
        acts[pos] = value
    return acts


def _url(here: Here, asked: Prompt) -> str:
    return here.view.url(PATH, **asked.query())
