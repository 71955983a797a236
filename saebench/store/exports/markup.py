"""Pieces of a page: tokens made visible and escaped, numbers in few digits, tables."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

GLYPHS = {"\n": "↵", "\r": "␍", "\t": "⇥", "\x7f": "␡", "\u00a0": "⍽"}


def bar(text: str, part: float, kind: str = "bar") -> tuple[str, str]:
    """A cell with a bar behind its number."""
    return text, f' class="{kind}" style="--w:{min(max(part, 0), 1):.1%}"'


def table(
    heads: Sequence[str], lines: Iterable[Sequence[str | tuple[str, str]]], *, left: Sequence[int]
) -> str:
    """``lines`` hold HTML, or a pair of it and the attributes of its cell."""

    to_left = ' class="l"'

    def cell(at: int, content: str | tuple[str, str]) -> str:
        inner, attributes = content if isinstance(content, tuple) else (content, "")
        return f"<td{to_left if at in left else attributes}>{inner}</td>"

    head = "".join(f"<th{to_left if at in left else ''}>{name}</th>" for at, name in enumerate(heads))
    body = "".join(f"<tr>{''.join(cell(at, c) for at, c in enumerate(line))}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def token(text: Any) -> str:
    """A token by itself, its outer spaces shown."""
    return f"<code>{escape(visible(text))}</code>" if isinstance(text, str) else ""


def visible(text: str, *, joined: bool = False) -> str:
    """``text`` with a sign for each control character and a name for those that reorder a line.

    ``joined`` tokens stand beside others, so their outer spaces are seen as they are.
    """
    shown = "".join(_sign(char) for char in text)
    if joined:
        return shown
    inner = shown.strip(" ")
    at = shown.index(inner)
    return "␣" * at + inner + "␣" * (len(shown) - at - len(inner)) if shown else "◌"


def _sign(char: str) -> str:
    if char in GLYPHS:
        return GLYPHS[char]
    if char < " ":
        return chr(0x2400 + ord(char))
    if char in "\u200c\u200d" or unicodedata.category(char) not in ("Cc", "Cf", "Zl", "Zp", "Cs"):
        return char
    return f"⟨U+{ord(char):04X}⟩"


def number(value: Any) -> str:
    """Three significant digits."""
    if value is None or not math.isfinite(value):
        return "–"  # noqa: RUF001
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def share(value: Any) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.3g}%"  # noqa: RUF001


def short(count: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count // size}{unit}"
    return str(count)
