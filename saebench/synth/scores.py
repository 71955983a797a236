"""``Score``: the metrics of one SAE over seeds, and the test whether two scores differ."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

L0_TOLERANCE = 0.05
"""Relative difference of the L0 at inference from k up to which they count as equal."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """The metrics of one variant in one inference mode on one data set."""

    data: str
    sae: str
    """Label: the variant and, if it has several, the inference mode."""
    k: int
    test_rows: int
    """Number of rows measured on."""
    values: dict[str, list[float]]
    """Metric -> one value per seed."""

    def mean(self, metric: str) -> float:
        return statistics.fmean(self.values[metric])

    def sd(self, metric: str) -> float:
        """Sample standard deviation over seeds; 0 for a single seed."""
        values = self.values[metric]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    @property
    def n_seeds(self) -> int:
        return len(self.values["l0"])

    @property
    def at_k(self) -> bool:
        """Whether the mean L0 at inference differs from k by at most 5%."""
        return abs(self.mean("l0") / self.k - 1) <= L0_TOLERANCE


def exceeds(a: Score, b: Score, metric: str) -> bool:
    """Whether the mean of ``a`` is above that of ``b`` by more than the spread over seeds.

    The spread is the sum of the two standard deviations, so the intervals mean +- sd do not overlap.
    """
    return a.mean(metric) - b.mean(metric) > a.sd(metric) + b.sd(metric)
