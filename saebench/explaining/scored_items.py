"""Scores from verdicts: balanced accuracy, AUC, and a confidence interval over documents.

Shapes: Q questions that were answered, B resamplings, G documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saebench.explaining.scoring import INTERVAL, resamplings

MOST_FAILED = 0.05
"""Largest fraction of questions without an answer; with more, there is no score."""


def score_items(scorer: str, items: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """A row of expl_score (except its key) from rows of expl_item.

    ``value`` is balanced accuracy: the mean of the true positive rate and the true negative rate. It, its
    interval, precision, recall and AUC are None when too many questions failed, or when there are no true or
    no false items.
    """
    answered = [item for item in items if item["status"] == "ok"]
    truth_Q = np.array([item["truth"] for item in answered], dtype=bool)
    said_Q = np.array([item["verdict"] for item in answered], dtype=bool)
    counts = {
        "tp": int((truth_Q & said_Q).sum()),
        "fp": int((~truth_Q & said_Q).sum()),
        "fn": int((truth_Q & ~said_Q).sum()),
        "tn": int((~truth_Q & ~said_Q).sum()),
        "n_failed": len(items) - len(answered),
    }
    none = dict.fromkeys(("value", "ci_lo", "ci_hi", "precision", "recall", "auc"))
    row = {"scorer": scorer, **none, **counts, "rule": None}
    n_true, n_false = int(truth_Q.sum()), int((~truth_Q).sum())
    if counts["n_failed"] > MOST_FAILED * len(items) or not n_true or not n_false:
        return row
    tp, fp, tn = counts["tp"], counts["fp"], counts["tn"]
    low, high = _interval(truth_Q, said_Q, np.array([item["doc"] for item in answered]), seed)
    chances = [item["probability"] for item in answered]
    return row | {
        "value": (tp / n_true + tn / n_false) / 2,
        "ci_lo": low,
        "ci_hi": high,
        "precision": tp / (tp + fp) if tp + fp else None,
        "recall": tp / n_true,
        "auc": None if None in chances else auc(truth_Q, np.array(chances)),
    }


def auc(truth_Q: NDArray[np.bool_], chance_Q: NDArray[np.float64]) -> float:
    """Fraction of pairs in which the true item has the higher probability; ties count half."""
    high, low = chance_Q[truth_Q][:, None], chance_Q[~truth_Q][None, :]
    return float(((high > low) + 0.5 * (high == low)).mean())


def _interval(
    truth_Q: NDArray[np.bool_], said_Q: NDArray[np.bool_], doc_Q: NDArray[Any], seed: int
) -> tuple[float | None, float | None]:
    docs, which_Q = np.unique(doc_Q, return_inverse=True)
    kinds = [truth_Q & said_Q, truth_Q, ~truth_Q & ~said_Q, ~truth_Q]
    parts_G4 = np.stack([np.bincount(which_Q, weights=kind, minlength=len(docs)) for kind in kinds], axis=1)
    tp_B, true_B, tn_B, false_B = (resamplings(len(docs), seed) @ parts_G4).T
    both = (true_B > 0) & (false_B > 0)
    if not both.any():
        return None, None
    low, high = np.quantile((tp_B[both] / true_B[both] + tn_B[both] / false_B[both]) / 2, INTERVAL)
    return float(low), float(high)
