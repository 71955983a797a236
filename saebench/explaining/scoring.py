"""Scores of rules on the test fold: exact counts, and a confidence interval from resampling documents.

Shapes: N rows, R some rows, D documents (or groups of them), B resamplings.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saebench.explaining.token_index import Rows, TokenIndex
from saebench.store.folds import TEST

RESAMPLINGS = 400
MOST_GROUPS = 2048
"""With more test documents, this many groups of documents are resampled instead, which bounds memory."""
INTERVAL = (0.025, 0.975)


@dataclass(frozen=True)
class RuleScore:
    """Counts over all tokens of the test documents; F1 (``value``) and its interval."""

    value: float
    ci_lo: float
    ci_hi: float
    precision: float | None
    recall: float
    tp: int
    fp: int
    fn: int
    tn: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class RuleScorer:
    """Scores rules on the test fold of one text."""

    def __init__(self, index: TokenIndex, seed: int) -> None:
        self.index = index
        docs = np.unique(index.doc_N[index.rows[TEST]])
        self.n_groups = max(1, min(len(docs), MOST_GROUPS))
        self._group_N = np.searchsorted(docs, index.doc_N) % self.n_groups
        self.weight_BD = resamplings(self.n_groups, seed)

    def score(self, said_R: Rows, firing_R: Rows) -> RuleScore:
        """Score a rule that holds at the rows ``said_R`` of a latent that fires at ``firing_R``.

        Both are rows of the test fold, each once; there is at least one firing.
        """
        true_R = np.intersect1d(said_R, firing_R, assume_unique=True)
        parts_D3 = np.stack([self._by_group(rows) for rows in (true_R, said_R, firing_R)], axis=1)
        some = parts_D3.any(1)
        true_B, said_B, fires_B = (self.weight_BD[:, some] @ parts_D3[some]).T
        f1_B = (2 * true_B / np.maximum(said_B + fires_B, 1))[fires_B > 0]
        low, high = np.quantile(f1_B, INTERVAL) if len(f1_B) else (0.0, 1.0)
        tp, n_said, n_fires = len(true_R), len(said_R), len(firing_R)
        n_rows = len(self.index.rows[TEST])
        return RuleScore(
            value=2 * tp / (n_said + n_fires),
            ci_lo=float(low),
            ci_hi=float(high),
            precision=tp / n_said if n_said else None,
            recall=tp / n_fires,
            tp=tp,
            fp=n_said - tp,
            fn=n_fires - tp,
            tn=n_rows - n_said - n_fires + tp,
        )

    def _by_group(self, row_R: Rows) -> NDArray[np.float64]:
        return np.bincount(self._group_N[row_R], minlength=self.n_groups).astype(np.float64)


def resamplings(n: int, seed: int) -> NDArray[np.float64]:
    """[B, n]: how often each of ``n`` items is drawn in each of B bootstrap samples."""
    drawn_B = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLINGS)
    return drawn_B.astype(np.float64)
