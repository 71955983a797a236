"""Coactivation of latents: the number of tokens on which two fire, and the correlation of their activations.

All pairs of latents that fire on a token are counted, which is quadratic in the number of latents per token.
In a large store only a random sample of the tokens is counted; in a small one all of them.

Shapes: N rows of the cache, T of them counted, M latents, J neighbors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from saebench.core.hashing import hash_random
from saebench.store.corpus import chunks
from saebench.store.schema import NEIGHBOR_KINDS, NEIGHBORS_PER_FEATURE
from saebench.store.sorted_spill import Activations

MOST_PAIRS = 200_000_000
"""Pairs of latents, over all tokens looked at, that are counted; some fifteen seconds' work of one core."""

BLOCK = 512
"""Latents whose pairs are in memory at once."""


class CoactivationCounter:
    """Collects the activations on the counted tokens, group by group, and computes the neighbors."""

    def __init__(self, n_rows: int, d_sae: int, n_activations: int, seed: int) -> None:
        n_pairs = n_activations * (n_activations / n_rows)  # at least; more when tokens differ in number
        share = min(1.0, MOST_PAIRS / max(n_pairs, 1))
        self._chosen_N = np.ones(n_rows, dtype=bool)
        if share < 1:
            for rows in chunks(n_rows):
                bits = hash_random(np.arange(rows.start, rows.stop), 3, seed)
                self._chosen_N[rows] = bits < np.uint64(share * float(2**64 - 2**12))
        self._rows_T = np.flatnonzero(self._chosen_N)
        self._counts: list[NDArray[np.int64]] = []
        self._places: list[NDArray[np.int32]] = []
        self._values: list[NDArray[np.float32]] = []

    @property
    def n_tokens(self) -> int:
        """Tokens looked at."""
        return len(self._rows_T)

    def add(self, acts: Activations) -> None:
        """Take the next group of latents; all groups, in ascending order."""
        at = np.flatnonzero(self._chosen_N[acts.row_S])
        self._counts.append(np.bincount(acts.latent_S[at], minlength=acts.n_latents))
        self._places.append(np.searchsorted(self._rows_T, acts.row_S[at]).astype(np.int32))
        self._values.append(acts.value_S[at])

    def rows(self, n: int = NEIGHBORS_PER_FEATURE) -> dict[str, Any]:
        """Rows of the neighbor table, kinds cofire and correlation: the ``n`` first of each latent.

        Only latents that fire together on a token looked at are neighbors; equal ones by their numbers.
        """
        from scipy import sparse

        n_M = np.concatenate(self._counts)
        ends = np.concatenate([[0], np.cumsum(n_M)])
        shape = (len(n_M), max(self.n_tokens, 1))
        place, value = np.concatenate(self._places), np.concatenate(self._values)
        fires_MT = sparse.csr_array((np.ones(len(place), dtype=np.float32), place, ends), shape=shape)
        value_MT = sparse.csr_array((value, place, ends), shape=shape)
        fires_TM, value_TM = fires_MT.T.tocsr(), value_MT.T.tocsr()
        mean_M, sd_M = _mean_and_sd(value, n_M, shape[1])
        kinds = [NEIGHBOR_KINDS[kind] for kind in ("cofire", "correlation")]
        others = np.full((2, len(n_M), n), -1, dtype=np.int64)
        scores, n_boths = np.zeros(others.shape, dtype=np.float32), np.zeros(others.shape, dtype=np.uint32)
        for start in range(0, len(n_M), BLOCK):
            both, product = (
                (one[start : start + BLOCK] @ other)
                for one, other in ((fires_MT, fires_TM), (value_MT, value_TM))
            )
            dense_M = np.zeros(len(n_M), dtype=np.float64)
            for row in range(both.shape[0]):
                latent = start + row
                here, there = _slice(both, row), _slice(product, row)
                other = both.indices[here]
                n_both = both.data[here].astype(np.int64)
                dense_M[product.indices[there]] = product.data[there]  # it lacks what cancels to 0
                mean_product = dense_M[other] / shape[1]
                dense_M[product.indices[there]] = 0
                jaccard = n_both / (n_M[latent] + n_M[other] - n_both)
                spread = np.maximum(sd_M[latent] * sd_M[other], np.finfo(np.float64).tiny)
                correlation = (mean_product - mean_M[latent] * mean_M[other]) / spread
                for side, score in enumerate((jaccard, correlation.clip(-1, 1))):
                    best = _first(score.astype(np.float32), other, latent, n)
                    others[side, latent, : len(best)] = other[best]
                    scores[side, latent, : len(best)] = score[best]
                    n_boths[side, latent, : len(best)] = n_both[best]
        kind, latent_Y, rank = np.nonzero(others >= 0)
        some = kind, latent_Y, rank
        return {
            "feature": latent_Y,
            "kind": np.array(kinds)[kind],
            "rank": rank,
            "other": others[some],
            "score": scores[some],
            "n_both": n_boths[some],
        }


def _first(score: NDArray[Any], other: NDArray[Any], latent: int, n: int) -> NDArray[np.intp]:
    """Indices of the ``n`` largest scores except the latent's own, in descending order; ties by ``other``."""
    at = np.flatnonzero(other != latent)
    if len(at) > 4 * n:
        threshold = np.partition(score[at], len(at) - n)[len(at) - n]
        at = at[score[at] >= threshold]
    return at[np.lexsort((other[at], -score[at]))][:n]


def _slice(matrix: Any, row: int) -> slice:
    return slice(matrix.indptr[row], matrix.indptr[row + 1])


def _mean_and_sd(
    value: NDArray[np.float32], n_M: NDArray[np.int64], n_tokens: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each latent's activations over all tokens looked at, 0 where it does not fire."""
    latent = np.repeat(np.arange(len(n_M)), n_M)
    mean_M = np.bincount(latent, weights=value, minlength=len(n_M)) / n_tokens
    square_M = np.bincount(latent, weights=value.astype(np.float64) ** 2, minlength=len(n_M)) / n_tokens
    return mean_M, np.sqrt(np.maximum(square_M - mean_M**2, 0))
