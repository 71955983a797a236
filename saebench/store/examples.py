"""Choosing the stored examples of each latent: firings, and windows in which it does not fire.

Shapes: S activations of a group of latents, G segments (a latent in one context), E examples, L latents that
fire, K parts of their firings.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from saebench.core.hashing import hash_random, uniform_below
from saebench.store.corpus import Corpus
from saebench.store.folds import fold_of
from saebench.store.negatives import near_misses, silent
from saebench.store.schema import DECILES, GROUP_NEAR_MISS, GROUP_NEGATIVE, GROUP_RANDOM, GROUP_TOP
from saebench.store.sorted_spill import Activations, ordered_bits
from saebench.store.windows import Windows


def per_decile(n: int) -> int:
    """Examples stored per decile, when the other groups have ``n``."""
    return -(-n // 5)


def examples(acts: Activations, corpus: Corpus, *, n: int, window: int, seed: int) -> dict[str, Any]:
    """Rows of the example table for a group of latents, at most ``n`` in each group.

    Top: the largest activation of each of the ``n`` contexts with the largest activations; ties are broken
    by row. Random: ``n`` firings, uniform without replacement. Deciles: see ``deciles``. Negatives: see
    negatives.py; without text there are no near misses. All choices depend on seed, latent and row only.
    """
    top_E, random_E = top(acts, corpus, n), random(acts, n, seed)
    decile_E, at_E, size_E = deciles(acts, per_decile(n), seed)
    drawn_M = np.bincount(acts.latent_S[random_E], minlength=acts.n_latents)
    weight_E = (acts.counts_M / np.maximum(drawn_M, 1))[acts.latent_S[random_E]]
    firings = np.concatenate([top_E, at_E, random_E])
    parts = [
        (
            acts.latent_S[firings],
            acts.row_S[firings],
            acts.value_S[firings],
            np.concatenate([np.full(len(top_E), GROUP_TOP), decile_E, np.full(len(random_E), GROUP_RANDOM)]),
            np.concatenate([np.full(len(top_E), np.nan), size_E, weight_E]),
        ),
    ]
    found = [(GROUP_NEGATIVE, silent(acts, corpus, n=n, window=window, seed=seed))]
    if corpus.has_text:
        found.append((GROUP_NEAR_MISS, near_misses(acts, corpus, n=n, window=window, seed=seed)))
    for group, (latent_E, row_E) in found:
        zero_E = np.zeros(len(row_E), dtype=np.float32)
        parts.append((latent_E, row_E, zero_E, np.full(len(row_E), group), np.full(len(row_E), np.nan)))
    latent_E, row_E, value_E, grp_E, weight_E = (
        np.concatenate(columns) for columns in zip(*parts, strict=True)
    )
    order = np.lexsort((grp_E, latent_E))
    latent_E, row_E, grp_E = latent_E[order], row_E[order], grp_E[order]
    import pyarrow

    weight_E = weight_E[order]
    rows = {
        "feature": latent_E + acts.first,
        "grp": grp_E,
        "rank": _rank(latent_E * 256 + grp_E),
        "value": value_E[order],
        "weight": pyarrow.array(weight_E, mask=np.isnan(weight_E)),
    }
    empty = pyarrow.array([[]] * len(row_E), type=pyarrow.list_(pyarrow.float32()))
    none = pyarrow.nulls(len(row_E), pyarrow.uint32())
    if corpus.has_units:
        rows |= Windows(acts, corpus, latent_E, row_E, window).columns()
        return rows | {"fold": fold_of(rows["doc"]) if corpus.has_text else none}
    zero = np.zeros(len(row_E), dtype=np.int64)
    return rows | {
        "ctx": row_E,
        "pos": zero,
        "doc": none,
        "fold": none,
        "start": zero,
        "tokens": empty,
        "acts": empty,
    }


def top(acts: Activations, corpus: Corpus, n: int) -> NDArray[np.int64]:
    """Indices into S, by latent and then by descending activation."""
    if not len(acts.row_S):
        return np.empty(0, dtype=np.int64)
    ctx_S = corpus.ctx_of(acts.row_S)
    new_S = np.ones(len(ctx_S), dtype=bool)
    new_S[1:] = (ctx_S[1:] != ctx_S[:-1]) | (acts.latent_S[1:] != acts.latent_S[:-1])
    starts_G = np.flatnonzero(new_S)
    largest_G = np.maximum.reduceat(acts.value_S, starts_G)
    latent_G = acts.latent_S[starts_G]
    likely_G = _largest(latent_G, largest_G, acts.n_latents, n)
    segment_S = np.cumsum(new_S) - 1
    at = np.flatnonzero(likely_G[segment_S] & (acts.value_S == largest_G[segment_S]))
    at = at[np.concatenate([[True], np.diff(segment_S[at]) != 0])] if len(at) else at
    return _first_of_each(acts, at, -acts.value_S[at], n)


def random(acts: Activations, n: int, seed: int) -> NDArray[np.int64]:
    """Indices into S, by latent and then in random order."""
    bits_S = hash_random(acts.row_S, acts.latent_S + acts.first, seed)
    # In all but one of 10^20 latents enough random bits are below the threshold; the rest use all firings.
    share_M = np.minimum((4 * n + 64) / np.maximum(acts.counts_M, 1), 1.0)
    low_S = bits_S <= (share_M * float(2**64 - 2**12)).astype(np.uint64)[acts.latent_S]
    drawn_M = np.bincount(acts.latent_S[low_S], minlength=acts.n_latents)
    short_M = drawn_M < np.minimum(acts.counts_M, n)
    at = np.flatnonzero(low_S | short_M[acts.latent_S])
    return _first_of_each(acts, at, bits_S[at], n)


def deciles(
    acts: Activations, n: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """``(decile, index into S, number of firings it represents)``, by latent and ascending activation.

    The firings of a latent, sorted by activation and then by row, are cut into ten parts of equal count. Each
    part is cut into ``n``, and one firing is drawn from each that is not empty. A sum over examples, weighted
    by the number of firings that each represents, estimates the sum over all firings.
    """
    alive_L = np.flatnonzero(acts.counts_M)
    n_L1 = acts.counts_M[alive_L][:, None]
    decile_K = np.repeat(np.arange(len(DECILES)), n)
    n_deciles = len(DECILES)
    low_LK, high_LK = -(-decile_K * n_L1 // n_deciles), -(-(decile_K + 1) * n_L1 // n_deciles)
    part_K = np.tile(np.arange(n), n_deciles)
    length_LK = high_LK - low_LK
    low_LK, high_LK = low_LK + length_LK * part_K // n, low_LK + length_LK * (part_K + 1) // n
    bits_LK = hash_random((alive_L + acts.first)[:, None], np.arange(n * n_deciles)[None], seed + 1)
    rank_LK = low_LK + uniform_below(bits_LK, high_LK - low_LK)
    some_LK = high_LK > low_LK
    at = acts.order_S[(acts.starts_M[alive_L][:, None] + rank_LK)[some_LK]]
    decile_LK = np.broadcast_to(decile_K + DECILES[0], some_LK.shape)
    return decile_LK[some_LK], at, (high_LK - low_LK)[some_LK]


def _largest(
    latent_G: NDArray[np.int64], value_G: NDArray[np.float32], n_latents: int, n: int
) -> NDArray[np.bool_]:
    """Which entries are among the ``n`` largest of their latent, or equal to the last of these."""
    key_G = latent_G.astype(np.uint64) << np.uint64(32) | ordered_bits(value_G)
    sorted_G = np.sort(key_G, kind="stable")
    count_M = np.bincount(latent_G, minlength=n_latents)
    stop_M = np.cumsum(count_M)
    threshold_M = sorted_G[np.minimum(np.maximum(stop_M - n, stop_M - count_M), len(sorted_G) - 1)]
    largest_G: NDArray[np.bool_] = key_G >= threshold_M[latent_G]
    return largest_G


def _first_of_each(acts: Activations, at: NDArray[np.int64], by: NDArray[Any], n: int) -> NDArray[np.int64]:
    """The first ``n`` of ``at`` for each latent, ordered by latent, ``by`` and row."""
    at = at[np.lexsort((acts.row_S[at], by, acts.latent_S[at]))]
    return at[_rank(acts.latent_S[at]) < n]


def _rank(sorted_key_E: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each entry among those of the same key."""
    first = np.searchsorted(sorted_key_E, sorted_key_E)
    return np.arange(len(sorted_key_E)) - first
