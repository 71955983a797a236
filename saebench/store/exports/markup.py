"""HTML elements of the exported page: escaped tokens, tables, cells with bars."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from saebench.core.formatting import visible


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


def shown(words: str) -> str:
    """What people, models or files said, escaped and with every character visible."""
    return escape(visible(words, spaces="kept"))


def token(text: Any) -> str:
    """A token by itself, its outer spaces shown."""
    return f"<code>{escape(visible(text, spaces='edges'))}</code>" if isinstance(text, str) else ""


def short(count: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count // size}{unit}"
    return str(count)
