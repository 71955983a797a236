"""Interleaved timing of several functions, so that their ratios also hold on a busy machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Timed = Callable[[], float]
"""Makes one call and returns its seconds."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds per call of one entry, and the number of measured calls."""

    median: float
    smallest: float
    largest: float
    calls: int


def take_turns(
    entries: Mapping[str, Timed], *, turns: int, calls: int = 2, announce: Callable[[str], None]
) -> dict[str, Timing]:
    """Time every entry ``calls`` times in each of ``turns`` rounds.

    Entries that are timed one after another share the machine's other load, so ratios also hold on a busy
    machine. Every second round has the reverse order, so no entry always follows the same one. The first call
    of each turn refills the caches and is not counted. One uncounted round before the first one warms up
    allocators.

    Args:
        announce: called with the name of the entry before each turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    for turn in range(turns + 1):
        order = list(entries)[:: 1 if turn % 2 else -1]
        for name in order:
            announce(name)
            entries[name]()
            taken = [entries[name]() for _ in range(calls)]
            if turn > 0:
                seconds[name] += taken
    return {
        name: Timing(
            median=statistics.median(taken), smallest=min(taken), largest=max(taken), calls=len(taken)
        )
        for name, taken in seconds.items()
    }
