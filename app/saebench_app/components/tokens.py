"""Text with its tokens colored by activation: the one way in which all pages show a feature on text."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saebench.core.formatting import number, visible
from saebench.store.example_windows import bounds
from saebench_app.components.head import Head, plain
from saebench_app.components.web import show


@dataclass(frozen=True)
class Colors:
    """How an activation becomes a color.

    Attributes:
        scale: the activation shown in the strongest color.
        kind: 'linear', 'sqrt', which tells weak ones apart, or 'rank', by place among ``others``.
        above: share of ``scale`` below which a token stays uncolored.
        others: sizes of all activations shown, ascending; for 'rank'.
    """

    scale: float
    kind: str = "linear"
    above: float = 0.0
    others: Sequence[float] = ()

    def level(self, act: float) -> float:
        """From 0 to 1."""
        if self.scale <= 0:
            return 0.0
        if self.kind == "rank" and self.others:
            return round(bisect.bisect_right(self.others, abs(act)) / len(self.others), 3)
        part = min(abs(act) / self.scale, 1)
        return round(math.sqrt(part) if self.kind == "sqrt" else part, 3)

    def shows(self, act: float) -> bool:
        return act != 0 and abs(act) >= self.above * self.scale

    def legend(self) -> tuple[str, str]:
        """What the ends of the colors mean."""
        if self.kind == "rank":
            return "weakest shown", "strongest shown"
        return number(self.above * self.scale), number(self.scale)


def token_spans(
    pieces: Sequence[str],
    acts: Sequence[float],
    *,
    scale: float,
    colors: Colors | None = None,
    lines: bool = False,
) -> list[list[Any]]:
    """One ``[text, level, label]`` per token, level from 0 to 1; just ``[text]`` where it has no color.

    With ``lines``, the signs of line breaks break the line.
    """
    colors = colors or Colors(scale)
    return [
        [_shown(piece, lines), colors.level(act), number(act)]
        if colors.shows(act)
        else [_shown(piece, lines)]
        for piece, act in zip(pieces, acts, strict=True)
    ]


def _shown(piece: str, lines: bool) -> str:
    text = visible(piece)
    return text.replace("↵", "↵\n") if lines and "\n" in piece else text


def example(
    row: Mapping[str, Any],
    *,
    scale: float,
    window: int,
    colors: Colors | None = None,
    lines: bool = False,
    href: str = "",
) -> dict[str, Any]:
    """One example for ``examples``: ``window`` tokens on each side of the token that was drawn (0: all).
    ``href`` leads to its context."""
    pieces, acts = row["pieces"], row["acts"]
    first, last = bounds(row, window)
    label = row["label"] if isinstance(row["label"], str) else None
    place = f"context {row['ctx']}, position {row['pos']}"
    return {
        "value": number(row["value"]),
        "exact": float(row["value"]),
        "spans": token_spans(pieces[first:last], acts[first:last], scale=scale, colors=colors, lines=lines),
        "peak": int(row["pos"]) - int(row["start"]) - first,
        "before": first > 0,
        "after": last < len(pieces),
        "source": visible(label) if label else "",
        "place": f"{place}, fold {row['fold']}" if "fold" in row else place,
        "title": row.get("title", ""),
        "href": href,
    }


def examples(
    rows: Sequence[Mapping[str, Any]],
    *,
    scale: float,
    window: int,
    key: str,
    kind: str = "linear",
    above: float = 0.0,
    lines: bool = False,
    head: Head | None = None,
    settings: Head | None = None,
    name: str = "",
    place: Callable[[Mapping[str, Any]], str] = lambda row: "",
) -> None:
    """``scale`` is the activation shown in the strongest color, in the units of ``acts``; ``place`` gives
    the URL of the whole context of a row.

    A row with a ``title`` begins a part. ``settings`` are choices that are folded away; ``name`` is what the
    copied text begins with. J and K go to the next and the previous example.
    """
    others = sorted(abs(act) for row in rows for act in row["acts"] if act) if kind == "rank" else []
    colors = Colors(scale, kind, above, others)
    shown = [
        example(row, scale=scale, window=window, colors=colors, lines=lines, href=place(row)) for row in rows
    ]
    show_examples(shown, colors=colors, key=key, head=head, settings=settings, name=name)


def show_examples(
    shown: Sequence[Mapping[str, Any]],
    *,
    colors: Colors,
    key: str,
    head: Head | None = None,
    settings: Head | None = None,
    name: str = "",
) -> None:
    """As ``examples``, for rows that ``example`` has made."""
    low, high = colors.legend()
    show(
        "tokens",
        {
            "examples": list(shown),
            "low": low,
            "scale": high,
            "head": plain(head),
            "settings": plain(settings),
            "name": name,
        },
        key=key,
    )
