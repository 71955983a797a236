"""Text with its tokens coloured by activation: the one way in which all pages show a feature on text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from saebench_app.components.web import show
from saebench_app.numbers import number
from saebench_app.text import visible


def token_spans(pieces: list[str], acts: list[float], *, scale: float) -> list[list[Any]]:
    """One ``[text, level, label]`` a token, level from 0 to 1; just ``[text]`` where it does not fire."""
    return [
        [visible(piece), round(min(abs(act) / scale, 1), 3) if scale > 0 else 0, number(act)]
        if act
        else [visible(piece)]
        for piece, act in zip(pieces, acts, strict=True)
    ]


def example(row: dict[str, Any], *, scale: float, window: int, href: str = "") -> dict[str, Any]:
    """One example for ``examples``: ``window`` tokens on each side of the token that was picked (0: all).
    ``href`` leads to its place."""
    pieces, acts = row["pieces"], row["acts"]
    peak = int(row["pos"]) - int(row["start"])
    first, last = (max(peak - window, 0), min(peak + window + 1, len(pieces))) if window else (0, len(pieces))
    label = row["label"] if isinstance(row["label"], str) else None
    return {
        "value": number(row["value"]),
        "exact": float(row["value"]),
        "spans": token_spans(pieces[first:last], acts[first:last], scale=scale),
        "peak": peak - first,
        "before": first > 0,
        "after": last < len(pieces),
        "source": visible(label) if label else "",
        "place": f"context {row['ctx']}, position {row['pos']}",
        "href": href,
    }


def examples(
    rows: list[dict[str, Any]],
    *,
    scale: float,
    window: int,
    key: str,
    place: Callable[[dict[str, Any]], str] = lambda row: "",
) -> None:
    """``scale`` is the activation shown in the strongest colour, in the units of ``acts``; ``place`` gives
    the address at which the whole context of a row is shown."""
    shown = [example(row, scale=scale, window=window, href=place(row)) for row in rows]
    show("tokens", {"examples": shown, "scale": number(scale)}, key=key)
