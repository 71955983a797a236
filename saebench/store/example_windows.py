"""The part of an example that is shown around its token, and removal of repeated windows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def bounds(example: Mapping[str, Any], window: int) -> tuple[int, int]:
    """``(first, end)`` into its pieces: ``window`` tokens on each side of the token picked, or 0 for all."""
    n, at = len(example["pieces"]), int(example["pos"]) - int(example["start"])
    return (max(at - window, 0), min(at + window + 1, n)) if window else (0, n)


def distinct(examples: Iterable[Mapping[str, Any]], window: int) -> list[dict[str, Any]]:
    """The examples without those whose window has the same tokens in the same order as an earlier one's."""
    kept: dict[tuple[object, ...], dict[str, Any]] = {}
    for example in examples:
        first, end = bounds(example, window)
        words = tuple(example["tokens"][first:end]) or ("unit", example["ctx"], first)
        kept.setdefault(words, dict(example))
    return list(kept.values())
