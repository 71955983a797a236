"""Tables: headings that sort, cells with bars, and links; every state of one is a URL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import streamlit as st

from saebench.core.formatting import is_absent, visible
from saebench_app.components.head import Head, plain
from saebench_app.components.web import show


@dataclass(frozen=True)
class Heading:
    """``href`` sorts by the column; ``sorted`` says that it is sorted now."""

    label: str
    align: Literal["left", "right"] = "right"
    help: str = ""
    href: str = ""
    sorted: Literal["", "ascending", "descending"] = ""


@dataclass(frozen=True)
class Cell:
    """``exact`` is the number that ``text`` was written from; ``bar`` (0 to 1) draws it behind the text.
    A "text" keeps to one line, "words" take the width that is left, and both are cut where it ends; a
    "sentence" takes several lines."""

    text: str
    exact: float | int | None = None
    bar: float | None = None
    href: str = ""
    kind: Literal["", "token", "flag", "cold", "text", "words", "sentence"] = ""


def token_cell(text: Any) -> Cell:
    """The text of a token; empty where the store has none."""
    return Cell("") if is_absent(text) else Cell(visible(text, spaces="edges"), kind="token")


def text_cell(text: Any) -> Cell:
    """What people or models wrote; empty where they did not."""
    return Cell("") if is_absent(text) or text == "" else Cell(visible(text), kind="text")


def table(
    headings: Sequence[Heading],
    rows: Sequence[Sequence[Cell]],
    *,
    name: str,
    key: str,
    height: str = "",
    head: Head | None = None,
    selected: Sequence[int] | None = None,
    on_select: Callable[[list[int]], object] | None = None,
) -> None:
    """``name`` is what screen readers call it. A click on a row follows the link of its first cell. With
    a ``height`` (of CSS) that it outgrows, the table scrolls under its headings.

    With ``selected``, rows have boxes to tick: each stands for the ``exact`` number of its first cell, and
    ``on_select`` is given all that are ticked, those of other pages of the table too.
    """
    events: dict[str, Callable[[], None]] = {}
    if on_select is not None:

        def chosen() -> None:
            on_select([int(number) for number in st.session_state[key]["selected"] or []])

        events["on_selected_change"] = chosen
    show(
        "table",
        {
            "name": name,
            "height": height,
            "head": plain(head),
            "selected": None if selected is None else list(selected),
            "headings": [asdict(heading) for heading in headings],
            "rows": [
                [{k: v for k, v in asdict(cell).items() if v not in ("", None)} for cell in row]
                for row in rows
            ],
        },
        key=key,
        **events,
    )
