"""Formatting of results: tables for people or JSON for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saebench.core.files import finite


@dataclass(frozen=True)
class Result:
    """The result of a command."""

    data: Mapping[str, Any]
    """Plain JSON values, for --json; NaN and infinite numbers are printed as null."""
    text: str
    """The same result for people."""
    error_message: str | None = None
    """One sentence on what the user must change; makes the exit code 2."""

    def render(self, *, as_json: bool) -> str:
        if not as_json:
            return self.text
        return json.dumps(finite(self.data), indent=1, ensure_ascii=False, default=plain)


def plain(value: Any) -> Any:
    """JSON values for other types: dataclasses as objects, NumPy and torch numbers as numbers, else text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return finite(dataclasses.asdict(value))
    return finite(value.item()) if hasattr(value, "item") else str(value)


def pairs(rows: Mapping[str, object] | Iterable[tuple[str, object]]) -> str:
    """Two columns, names and values; values that are None are left out."""
    shown = [(name, cell(value)) for name, value in dict(rows).items() if value is not None]
    width = max((len(name) for name, _ in shown), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in shown)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns under ``header``; a column of numbers is aligned to the right."""
    given = [tuple(row) for row in rows]
    lines = [tuple(header), *(tuple(cell(value) for value in row) for row in given)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    right = [
        bool(given) and all(isinstance(row[i], int | float) for row in given) for i in range(len(header))
    ]
    return "\n".join(
        "  ".join(
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def cell(value: object) -> str:
    """A value formatted for people: 12,345 and 0.1234, lists with commas."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4f}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.3g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)
