"""Timing several things fairly: in turns, in alternating order, the first call of each turn unmeasured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Timed = Callable[[], float]
"""Does it once; returns the seconds that it took."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one contestant."""

    median: float
    smallest: float
    largest: float
    calls: int


def take_turns(
    contestants: Mapping[str, Timed], *, turns: int, calls: int = 2, said: Callable[[str], None]
) -> dict[str, Timing]:
    """Time every contestant ``turns`` times ``calls``.

    Neighbors in time share whatever else the machine is doing, so ratios hold on a busy machine too. Every
    second round goes backwards: nobody always comes after the same one. The first call of a turn refills the
    caches that the others emptied and is not counted; one whole turn before the first warms up allocators.

    Args:
        said: told the contestant's name before each turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(turns + 1):
        order = list(contestants)[:: 1 if turn % 2 else -1]
        for name in order:
            said(name)
            contestants[name]()
            taken = [contestants[name]() for _ in range(calls)]
            if turn > 0:
                seconds[name] += taken
    return {
        name: Timing(
            median=statistics.median(taken), smallest=min(taken), largest=max(taken), calls=len(taken)
        )
        for name, taken in seconds.items()
    }
