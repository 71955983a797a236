"""Tables: headings that sort, cells with bars, and links; every state of one is a URL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

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

    A "text" is a sentence, which may take several lines.
    """

    text: str
    exact: float | int | None = None
    bar: float | None = None
    href: str = ""
    kind: Literal["", "token", "text", "flag", "cold"] = ""


def table(
    headings: Sequence[Heading], rows: Sequence[Sequence[Cell]], *, name: str, key: str, height: str = ""
) -> None:
    """``name`` is what screen readers call it. A click on a row follows the link of its first cell. With
    a ``height`` (of CSS) that it outgrows, the table scrolls under its headings."""
    show(
        "table",
        {
            "name": name,
            "height": height,
            "headings": [asdict(heading) for heading in headings],
            "rows": [
                [{k: v for k, v in asdict(cell).items() if v not in ("", None)} for cell in row]
                for row in rows
            ],
        },
        key=key,
    )
