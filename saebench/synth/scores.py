"""The numbers of one SAE over seeds, and when two of them differ."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

L0_TOLERANCE = 0.05
"""Share of k by which the L0 at inference may miss it and still count as equal."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One way of reading one variant on one data set."""

    data: str
    sae: str
    """Label: the variant, and how it was read if there is a choice."""
    k: int
    test_rows: int
    """Rows measured on."""
    values: dict[str, list[float]]
    """Metric -> one value a seed."""

    def mean(self, metric: str) -> float:
        return statistics.fmean(self.values[metric])

    def sd(self, metric: str) -> float:
        """Sample standard deviation over seeds; 0 of a single one."""
        values = self.values[metric]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    @property
    def n_seeds(self) -> int:
        return len(self.values["l0"])

    @property
    def at_k(self) -> bool:
        """Whether the mean L0 at inference is k within 5%."""
        return abs(self.mean("l0") / self.k - 1) <= L0_TOLERANCE


def exceeds(a: Score, b: Score, metric: str) -> bool:
    """Whether a's mean is above b's by more than the spread over seeds.

    The spread is the sum of the two standard deviations: the intervals mean +- sd do not touch.
    """
    return a.mean(metric) - b.mean(metric) > a.sd(metric) + b.sd(metric)
