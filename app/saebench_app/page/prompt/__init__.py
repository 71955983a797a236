"""Prompt: which features fire on a text that the reader writes, and how two texts differ."""

from __future__ import annotations

from dataclasses import replace

import streamlit as st

from saebench.core.formatting import number
from saebench_app.answers import LONGEST_TEXT, Reading, compare, read
from saebench_app.components.notice import notice
from saebench_app.components.table import Cell, Heading, table
from saebench_app.described import describe
from saebench_app.page.prompt.grid import (
    PATH,
    ROWS,
    counted,
    is_sparse,
    show_at_token,
    show_controls,
    show_grid,
    show_tokens,
    sizes_of,
    url,
)
from saebench_app.page.prompt.query import Prompt
from saebench_app.runs import run_of, why_no_run
from saebench_app.session import Here

__all__ = ["PATH", "SECTION", "TITLE", "show"]

TITLE = "Prompt"
SECTION = "Inspect"
EXAMPLE_TOKENS = 40
NOTHING = "No feature to show: raise the density limit or include position 0."


def show(here: Here) -> None:
    asked = here.read(Prompt)
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
        here.show(here.view, changed if same else replace(changed, at=None))

    two = st.session_state["prompt_two"]
    columns = st.columns(2) if two else [st.container()]
    with columns[0]:
        st.text_area(
            "First text" if two else "Text",
            key="prompt_text",
            on_change=apply,
            height=92,
            max_chars=LONGEST_TEXT,
            placeholder="A text for the model to read",
        )
    if two:
        with columns[1]:
            st.text_area(
                "Second text",
                key="prompt_text2",
                on_change=apply,
                height=92,
                max_chars=LONGEST_TEXT,
                placeholder="A text to compare it with",
            )
    st.toggle("Compare with a second text", key="prompt_two", on_change=apply)


def _begin(here: Here) -> None:
    notice("Enter a text above to see which features fire on each of its tokens.", key="empty")
    if here.store.has("context"):
        text = "".join(here.store.context(0)["pieces"][1:EXAMPLE_TOKENS]).strip()
        query = Prompt(text=text[:LONGEST_TEXT], f=here.feature())
        st.button("Use the beginning of the store's text", on_click=lambda: here.show(here.view, query))


def _one(here: Here, asked: Prompt, reading: Reading, at: int) -> None:
    known = describe(here.store, [*reading.fires["feature"].tolist(), *asked.pinned(here)])
    show_tokens(here, asked, reading, at, known)
    show_controls(here, asked)
    fires = counted(reading.fires, asked, known)
    sizes = sizes_of(here, asked, fires, at)
    pinned = asked.pinned(here)
    listed = [*pinned, *(feature for feature in sizes if feature not in pinned)][:ROWS]
    left, right = st.columns([15, 8], gap="medium")
    with left:
        st.subheader("Features on the text")
        if not listed:
            notice(NOTHING, key="none")
        else:
            show_grid(here, asked, reading, at, listed, sizes, known)
            total = fires["feature"].nunique()
            st.caption(
                f"{min(len(listed), total):,} of {total:,} active features. Click a cell to color the text "
                "by its feature, a number to open the feature, the head of a column to select the token."
            )
    with right:
        show_at_token(here, asked, reading, at, known)


def _two(here: Here, asked: Prompt, reading: Reading, at: int) -> None:
    second = read(here, asked.text2)
    changes = compare(here, asked.text, asked.text2, keep_first=asked.bos)
    known = describe(here.store, [*changes["feature"].tolist(), *asked.pinned(here)])
    left, right = st.columns(2)
    with left:
        show_tokens(here, asked, reading, at, known)
    with right:
        show_tokens(here, asked, second, at, known, second=True)
    show_controls(here, asked)
    st.subheader("Largest differences")
    changes = changes.loc[[is_sparse(known[feature], asked) for feature in changes["feature"]]].head(ROWS)
    most = float(changes["difference"].abs().max()) if len(changes) else 1.0
    rows = [
        [
            Cell(str(feature), exact=feature, href=url(here, replace(asked, f=feature))),
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
        Heading("feature", align="left"),
        Heading("max, first text"),
        Heading("max, second text"),
        Heading("difference", help="second minus first"),
        Heading("name", align="left"),
    ]
    if rows:
        table(headings, rows, name="Largest differences", key="changes")
    else:
        notice(NOTHING, key="none")
