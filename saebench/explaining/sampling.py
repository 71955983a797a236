"""Examples for language models: from training documents to explain, from test documents to score.

A window is a sequence of consecutive encoded tokens of one document in one context. The windows that are
shown to explain a feature and those that are asked about to score it share neither documents nor contexts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from saebench.core.hashing import hash_random
from saebench.explaining.token_index import Rows, TokenIndex
from saebench.store.folds import TEST, TRAIN

BEFORE = 2 / 3
"""Fraction of a window that is before the token it is drawn for."""
NEAR_MISS = 0.5
"""Fraction of the negatives that contain a token on which the feature fires elsewhere."""
TRIES = 20


@dataclass(frozen=True)
class Window:
    """A part of a context: ``tokens`` from position ``start``; ``fires`` are the positions of firings."""

    doc: int
    ctx: int
    start: int
    tokens: tuple[int, ...]
    fires: tuple[int, ...]


@dataclass(frozen=True)
class Examples:
    """Windows of training documents (``shown``) and of test documents, with firings or without."""

    shown: list[Window] = field(default_factory=list)
    positive: list[Window] = field(default_factory=list)
    negative: list[Window] = field(default_factory=list)


class Sampler:
    """Draws examples; those of a feature depend on the seed and the feature only."""

    def __init__(self, index: TokenIndex, *, n: int, window: int, seed: int) -> None:
        self.index, self.n, self.window, self.seed = index, n, window, seed
        new_N = np.ones(index.n_rows, dtype=bool)
        new_N[1:] = (np.diff(index.ctx_N) != 0) | (np.diff(index.doc_N) != 0) | (np.diff(index.pos_N) != 1)
        first = np.flatnonzero(new_N)
        length = np.diff(np.append(first, index.n_rows))
        self._first_N, self._stop_N = np.repeat(first, length), np.repeat(first + length, length)
        self._fires_N = np.zeros(index.n_rows, dtype=bool)

    def draw(self, feature: int, row_R: Rows, value_R: NDArray[np.float32]) -> Examples:
        """Examples of a latent that fires on ``row_R`` with the activations ``value_R``.

        Half of the shown windows have its largest activations; the other half and all positives are drawn at
        random. There are twice as many positives as negatives if enough contexts have firings.
        """
        fold_R = self.index.fold_N[row_R]
        train_R, test_R = row_R[fold_R == TRAIN], row_R[fold_R == TEST]
        self._fires_N[row_R] = True
        used: set[int] = set()
        strongest = train_R[np.lexsort((train_R, -value_R[fold_R == TRAIN]))]
        shown = self._windows(strongest, (self.n + 1) // 2, used)
        shown += self._windows(self._shuffled(train_R, feature, 0), self.n - len(shown), used)
        positive = self._windows(self._shuffled(test_R, feature, 1), 2 * self.n, used)
        near = round(self.n * NEAR_MISS)
        negative = self._windows(self._near(train_R, feature), near, used, silent=True)
        some = self._shuffled(self._some(TEST, feature), feature, 3)
        negative += self._windows(some, self.n - len(negative), used, silent=True)
        self._fires_N[row_R] = False
        return Examples(shown, positive, negative)

    def _windows(self, row_R: Rows, n: int, used: set[int], *, silent: bool = False) -> list[Window]:
        """Windows around the first ``n`` rows in unused contexts; with ``silent``, those without firings."""
        found: list[Window] = []
        for row in row_R[: TRIES * self.n * 4].tolist():
            if len(found) >= n:
                break
            ctx = int(self.index.ctx_N[row])
            if ctx in used:
                continue
            first, stop = int(self._first_N[row]), int(self._stop_N[row])
            low = max(first, min(row - int(self.window * BEFORE), stop - self.window))
            rows = np.arange(low, min(low + self.window, stop))
            fires = self._fires_N[rows]
            if silent and fires.any():
                continue
            used.add(ctx)
            found.append(
                Window(
                    doc=int(self.index.doc_N[row]),
                    ctx=ctx,
                    start=int(self.index.pos_N[low]),
                    tokens=tuple(self.index.token_N[0][rows].tolist()),
                    fires=tuple(self.index.pos_N[rows[fires]].tolist()),
                )
            )
        return found

    def _near(self, train_R: Rows, feature: int) -> Rows:
        """Test rows on which it does not fire, with the tokens on which it fires most often."""
        token_U, n_U = np.unique(self.index.token_N[0][train_R], return_counts=True)
        often = token_U[np.lexsort((token_U, -n_U))[:8]].tolist()
        row_R = self.index.rows_of_term([{"at": 0, "in": often}], TEST)
        return self._shuffled(row_R[~self._fires_N[row_R]], feature, 2)

    def _some(self, fold: int, feature: int) -> Rows:
        """Rows of a fold, drawn with replacement; enough for silent windows of all but dense latents."""
        row_R = self.index.rows[fold]
        bits = hash_random(np.arange(TRIES * self.n * 4), feature, self.seed)
        return np.unique(row_R[(bits % np.uint64(max(len(row_R), 1))).astype(np.int64)])

    def _shuffled(self, row_R: Rows, feature: int, use: int) -> Rows:
        return row_R[np.argsort(hash_random(row_R, feature * 4 + use, self.seed), kind="stable")]
