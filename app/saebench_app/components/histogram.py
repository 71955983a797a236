"""Counts over an interval as bars; a bar may be a link."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from saebench.core.formatting import count
from saebench_app.components.head import Head, plain
from saebench_app.components.web import show

Scale = Literal["linear", "log"]


@dataclass(frozen=True)
class Bar:
    """``size`` is drawn; ``text`` says in words what the bar stands for."""

    size: float
    text: str
    href: str = ""
    current: bool = False


def histogram(
    bars: Sequence[Bar],
    *,
    name: str,
    edges: Sequence[str],
    axis: str,
    key: str,
    scale: Scale = "log",
    head: Head | None = None,
) -> None:
    """``edges`` are written below the bars, from left to right; ``axis`` says what they are."""
    largest = max((bar.size for bar in bars), default=0)
    heights = [_height(bar.size, largest, scale) for bar in bars]
    top = count(largest) if scale == "log" else f"{largest:.2g}"
    show(
        "histogram",
        {
            "name": name,
            "axis": axis,
            "edges": list(edges),
            "top": f"{top}, logarithmic" if scale == "log" else top,
            "head": plain(head),
            "bars": [asdict(bar) | {"height": high} for bar, high in zip(bars, heights, strict=True)],
        },
        key=key,
    )


def _height(size: float, largest: float, scale: Scale) -> float:
    """From 0 to 1; on a logarithmic scale a count of 1 is still a visible bar."""
    if size <= 0 or largest <= 0:
        return 0.0
    return round(math.log1p(size) / math.log1p(largest) if scale == "log" else size / largest, 4)
