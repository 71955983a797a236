"""Which firings of a latent are shown, and the window of text around each.

Shapes: S activations of a group of latents, G segments (a latent in one context), E examples, W window.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from saebench.store.corpus import Corpus
from saebench.store.runs import Activations
from saebench.store.schema import GROUP_RANDOM, GROUP_TOP
from saebench.store.statistics import list_column, ordered_bits

BEFORE = 2 / 3
"""Share of a window that lies before its token: a causal model has read only that."""


def examples(acts: Activations, corpus: Corpus, *, n: int, window: int, seed: int) -> dict[str, Any]:
    """Rows of the example table for a group of latents, ``n`` at most in each group of examples.

    Top: the largest activation of each of the ``n`` contexts in which the latent fires hardest; equal ones
    in the order of rows. Random: ``n`` firings, uniform without replacement; the choice depends on seed,
    latent and row alone.
    """
    chosen = [(GROUP_TOP, top(acts, corpus, n)), (GROUP_RANDOM, random(acts, n, seed))]
    at_E = np.concatenate([at for _, at in chosen])
    grp_E = np.concatenate([np.full(len(at), grp) for grp, at in chosen])
    latent_E = acts.latent_S[at_E]
    order = np.lexsort((grp_E, latent_E))
    at_E, grp_E, latent_E = at_E[order], grp_E[order], latent_E[order]
    row_E = acts.row_S[at_E]
    rows = {
        "feature": latent_E + acts.first, "grp": grp_E, "rank": _rank(latent_E * 256 + grp_E),
        "value": acts.value_S[at_E],
    }  # fmt: skip
    if corpus.has_text:
        return rows | _windows(acts, corpus, latent_E, row_E, window)
    import pyarrow

    empty = pyarrow.array([[]] * len(at_E), type=pyarrow.list_(pyarrow.float32()))
    none = pyarrow.nulls(len(at_E), pyarrow.uint32())
    zero = np.zeros(len(at_E), dtype=np.int64)
    return rows | {"ctx": row_E, "pos": zero, "doc": none, "start": zero, "tokens": empty, "acts": empty}


def top(acts: Activations, corpus: Corpus, n: int) -> NDArray[np.int64]:
    """Indices into S, by latent and then by falling activation."""
    if not len(acts.row_S):
        return np.empty(0, dtype=np.int64)
    ctx_S = corpus.ctx[acts.row_S] if corpus.has_text else acts.row_S
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
    lot_S = _hash(acts.row_S.astype(np.uint64), acts.latent_S.astype(np.uint64) + np.uint64(acts.first), seed)
    # Enough drawn lots are below the threshold in all but one of 10^20 latents; those few take part whole.
    share_M = np.minimum((4 * n + 64) / np.maximum(acts.counts_M, 1), 1.0)
    low_S = lot_S <= share_M[acts.latent_S] * float(2**64 - 2**12)
    drawn_M = np.bincount(acts.latent_S[low_S], minlength=acts.n_latents)
    short_M = drawn_M < np.minimum(acts.counts_M, n)
    at = np.flatnonzero(low_S | short_M[acts.latent_S])
    return _first_of_each(acts, at, lot_S[at], n)


def _largest(
    latent_G: NDArray[np.int64], value_G: NDArray[np.float32], n_latents: int, n: int
) -> NDArray[np.bool_]:
    """Which entries are among the ``n`` largest of their latent, or equal to the last of these."""
    key_G = latent_G.astype(np.uint64) << np.uint64(32) | ordered_bits(value_G)
    sorted_G = np.sort(key_G)
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


def _hash(row_S: NDArray[np.uint64], latent_S: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """splitmix64 of (row, latent, seed)."""
    x = row_S * np.uint64(0x9E3779B97F4A7C15) + latent_S * np.uint64(0xD1B54A32D192ED03)
    x += np.uint64(seed % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x


def _windows(
    acts: Activations, corpus: Corpus, latent_E: NDArray[np.int64], row_E: NDArray[np.int64], window: int
) -> dict[str, Any]:
    """Tokens around each example, and the latent's activation at each of them."""
    ctx_E = corpus.ctx[row_E].astype(np.int64)
    pos_E = corpus.pos[row_E].astype(np.int64)
    length_E = corpus.context_len[ctx_E].astype(np.int64)
    start_E = np.clip(pos_E - int(window * BEFORE), 0, np.maximum(length_E - window, 0))
    where_EW = start_E[:, None] + np.arange(window)
    inside_EW = where_EW < length_E[:, None]
    example_X, offset_X = np.nonzero(inside_EW)
    where_X = start_E[example_X] + offset_X
    places = corpus.n_contexts * corpus.ctx_len
    key_S = acts.latent_S * places + corpus.place(acts.row_S)
    key_X = latent_E[example_X] * places + ctx_E[example_X] * corpus.ctx_len + where_X
    found_X = np.minimum(np.searchsorted(key_S, key_X), max(len(key_S) - 1, 0))
    acts_X: Any = (
        np.where(key_S[found_X] == key_X, acts.value_S[found_X], np.float32(0)) if len(key_S) else []
    )
    tokens_X = corpus.context_tokens[ctx_E[example_X], where_X]
    lengths_E = inside_EW.sum(1)
    return {
        "ctx": ctx_E, "pos": pos_E, "doc": corpus.doc[row_E], "start": start_E,
        "tokens": list_column(tokens_X, lengths_E),
        "acts": list_column(np.asarray(acts_X, dtype=np.float32), lengths_E),
    }  # fmt: skip
