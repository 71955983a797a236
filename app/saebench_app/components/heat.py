"""Which features fire on which tokens of a text: a grid with a row per feature and a column per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from saebench.core.formatting import number, visible
from saebench_app.components.web import show


@dataclass(frozen=True)
class Row:
    """``fires`` maps the position of a token to the value there; ``size`` is what the rows are sorted by."""

    feature: int
    fires: Mapping[int, float]
    size: float
    note: str
    href: str
    pin: str
    """The link that pins or unpins the feature."""
    pinned: bool


def heat(
    tokens: Sequence[tuple[int, str]],
    rows: Sequence[Row],
    *,
    name: str,
    key: str,
    measure: str,
    help: str,
    link: str,
    at: str,
    current: int | None,
    feature: int | None,
) -> None:
    """``tokens`` are positions and texts. A cell links to ``link`` with f=FEATURE and at=POSITION appended,
    the head of a column to ``at`` with at=POSITION appended; ``current`` and ``feature`` are selected.
    The strongest color is the largest value on the grid."""
    columns = {pos: column for column, (pos, _) in enumerate(tokens)}
    largest = max((abs(value) for row in rows for value in row.fires.values()), default=0) or 1
    shown = [
        {
            "feature": row.feature,
            "href": row.href,
            "note": row.note,
            "size": number(row.size),
            "exact": row.size,
            "pin": row.pin,
            "pinned": row.pinned,
            "cells": [
                [columns[pos], round(value / largest, 3), number(value)]
                for pos, value in row.fires.items()
                if pos in columns
            ],
        }
        for row in rows
    ]
    data = {
        "name": name,
        "tokens": [[pos, visible(text, spaces="edges")] for pos, text in tokens],
        "rows": shown,
        "measure": measure,
        "help": help,
        "link": link,
        "at": at,
        "current": -1 if current is None else current,
        "feature": -1 if feature is None else feature,
    }
    show("heat", data, key=key)
