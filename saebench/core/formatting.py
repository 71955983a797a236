"""How numbers and token texts are written: the same in the explorer, the exports, the figures and the CLI.

Numbers have few digits and no needless exponents. In token texts, characters without a shape get a sign, and
characters that could reorder a line are named; letters, marks, emoji and their joiners stay as they are. The
result is plain text: whoever puts it into markup escapes it.
"""

from __future__ import annotations

import math
import unicodedata
from typing import Any, Literal

ABSENT = "–"  # noqa: RUF001 - an en dash, for a value that is not there

GLYPHS = {"\n": "↵", "\r": "␍", "\t": "⇥", "\x7f": "␡", "\u00a0": "⍽"}
JOINERS = {"\u200c", "\u200d"}  # shape the letters and emoji around them
CONTINUED = "◌"
"""Stands for a token whose bytes end a character that an earlier token began."""


def is_absent(value: Any) -> bool:
    """Whether ``value`` is None, NaN, or one of the missing values of pandas."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or str(value) in ("<NA>", "NaT")


def count(value: Any) -> str:
    """A whole number: 12,345."""
    return ABSENT if is_absent(value) else f"{int(value):,}"


def number(value: Any, digits: int = 3, *, padded: bool = True) -> str:
    """A number with ``digits`` significant digits: 0.0123, 1.23, 1,235.

    Args:
        padded: keep trailing zeros, so that the numbers of a column have equally many digits (0.500); without
            it, 0.5.
    """
    if is_absent(value):
        return ABSENT
    value = float(value) + 0.0  # no minus before zero
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if not padded:
        return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
    size = _power_of_ten(value, digits)
    if size < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(digits - 1 - size, 0)}f}"


def share(value: Any, *, padded: bool = True) -> str:
    """A fraction as a percentage with three significant digits: 0.0123%; ``padded`` as in `number`."""
    if is_absent(value):
        return ABSENT
    percent = 100 * float(value)
    if not padded:
        return f"{percent:.3g}%"
    if percent in (0, 100):
        return f"{percent:.0f}%"
    size = _power_of_ten(percent, 3)
    return f"{percent:.{max(2 - size, 0)}f}%" if size >= -6 else f"{percent:.1e}%"


def one_in(value: Any) -> str:
    """A density in words: 1 token in 813."""
    if is_absent(value) or not float(value) > 0:
        return "no token"
    every = 1 / float(value)
    return f"1 token in {every:,.0f}" if every >= 10 else f"1 token in {every:.1f}"


def as_text(value: Any) -> str:
    """A value of a table as text: bytes are decoded, arrays are written as lists."""
    if isinstance(value, bytes | bytearray):
        return bytes(value).decode("utf-8", "backslashreplace")
    return value if isinstance(value, str) else str(value.tolist() if hasattr(value, "tolist") else value)


def visible(text: str, *, spaces: Literal["kept", "alone", "edges", "all"] = "alone") -> str:
    """``text`` with a sign for each line break, tab and control character, and names for bidi controls.

    Args:
        spaces: which spaces get a sign. "kept": none, for tokens inside a running text. "alone": those of a
            text that is nothing but white space. "edges": those at both ends, for a token in a table cell.
            "all": every one, for one line of a terminal or a figure.
    """
    if spaces == "all":
        text = text.replace("\n", "⏎").replace(" ", "·")
    shown = "".join(map(_sign, text))
    if spaces in ("kept", "all"):
        return shown
    if text == "":
        return CONTINUED
    if spaces == "edges" or text.isspace():
        inner = shown.strip(" ")
        before = len(shown) - len(shown.lstrip(" "))
        return "␣" * before + inner + "␣" * (len(shown) - len(inner) - before)
    return shown


def _sign(char: str) -> str:
    if char in GLYPHS:
        return GLYPHS[char]
    if char < " ":
        return chr(0x2400 + ord(char))
    if char in JOINERS or unicodedata.category(char) not in ("Cc", "Cf", "Zl", "Zp", "Cs"):
        return char
    return f"⟨U+{ord(char):04X}⟩"


def _power_of_ten(value: float, digits: int) -> int:
    """The exponent of ``value`` once it is rounded to ``digits`` digits."""
    return int(f"{value:.{digits - 1}e}".partition("e")[2])
