"""The parameters of the Steer page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from saebench_app.answers import LONGEST_TEXT
from saebench_app.described import Described
from saebench_app.url import Choice, Decimal, Query, Text, Whole, Wholes, parameter

CHANGES = {
    "add": "add to the activation",
    "clamp": "set the activation",
    "scale": "multiply the activation",
    "ablate": "ablate (set to 0)",
}
"""How features can be changed -> what it is called."""
SWEEP = (0.5, 1.0, 2.0, 4.0)
"""Strengths by default: multiples of the feature's max activation; factors when it is multiplied."""
MOST_STRENGTHS, MOST_FEATURES, MOST_TOKENS, MOST_SEED = 12, 8, 100, 10**9


@dataclass(frozen=True, kw_only=True)
class Steer(Query):
    """The parameters of this page."""

    text: str = parameter("", Text(LONGEST_TEXT))
    f: tuple[int, ...] = parameter((), Wholes(MOST_FEATURES))
    how: str = parameter("add", Choice(tuple(CHANGES)))
    strength: str = parameter("", Text(200))
    """Numbers with commas between them; empty for the default strengths."""
    new: int = parameter(20, Whole(1, MOST_TOKENS))
    temp: float = parameter(0.0, Decimal(0.0, 2.0))
    seed: int = parameter(0, Whole(0, MOST_SEED))
    s: int | None = parameter(None, Whole())
    """Which of the strengths is shown; None for one in the middle."""

    def strengths(self, known: Mapping[int, Described]) -> list[float] | None:
        """The strengths to try, or None when the text is not a list of numbers."""
        if self.how == "ablate":
            return [0.0]
        if self.strength.strip():
            try:
                values = [float(part) for part in self.strength.replace(";", ",").split(",") if part.strip()]
            except ValueError:
                return None
            fine = 0 < len(values) <= MOST_STRENGTHS and all(map(math.isfinite, values))
            return list(dict.fromkeys(values)) if fine else None
        unit = 1.0 if self.how == "scale" else max((known[f].max_act for f in self.f), default=1.0) or 1.0
        return [float(f"{times * unit:.2g}") for times in SWEEP]
