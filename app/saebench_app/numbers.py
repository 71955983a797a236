"""How numbers are written: few digits, no needless exponents, the same on every page."""

from __future__ import annotations

import math
from typing import Any

ABSENT = "–"  # noqa: RUF001 - an en dash, for a value that the store does not have


def is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or str(value) in ("<NA>", "NaT")


def count(value: Any) -> str:
    """A whole number: 12,345."""
    return ABSENT if is_absent(value) else f"{int(value):,}"


def number(value: Any, digits: int = 3) -> str:
    """A number with ``digits`` significant digits: 0.0123, 1.23, 1,235."""
    if is_absent(value):
        return ABSENT
    value = float(value) + 0.0  # no minus before zero
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    size = _size(value, digits)
    if size < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(digits - 1 - size, 0)}f}"


def share(value: Any) -> str:
    """A fraction as a percentage with three significant digits: 0.0123%."""
    if is_absent(value):
        return ABSENT
    percent = 100 * float(value)
    if percent in (0, 100):
        return f"{percent:.0f}%"
    size = _size(percent, 3)
    return f"{percent:.{max(2 - size, 0)}f}%" if size >= -6 else f"{percent:.1e}%"


def one_in(value: Any) -> str:
    """A density in words: 1 token in 813."""
    if is_absent(value) or not float(value) > 0:
        return "no token"
    every = 1 / float(value)
    return f"1 token in {every:,.0f}" if every >= 10 else f"1 token in {every:.1f}"


def _size(value: float, digits: int) -> int:
    """The power of ten of ``value`` once it is rounded to ``digits`` digits."""
    return int(f"{value:.{digits - 1}e}".partition("e")[2])
