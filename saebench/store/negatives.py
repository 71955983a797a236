"""Windows without firings of a latent: around a token that it fires on elsewhere, and at random.

Shapes: L latents of a group that fire, A tries for each, E = L * A tries in all.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from saebench.core.hashing import hash_random, uniform_below
from saebench.store.corpus import Corpus
from saebench.store.sorted_spill import Activations
from saebench.store.windows import Windows

TRIES = 3
"""Tries for each negative wanted. A latent that fires in nearly every window ends with fewer, or none."""

Ints = NDArray[np.int64]


def near_misses(acts: Activations, corpus: Corpus, *, n: int, window: int, seed: int) -> tuple[Ints, Ints]:
    """``(latent, row)``, at most ``n`` rows a latent: a token that it fires on, in a window without firing.

    The token is that of a random firing, the place any of its occurrences.
    """
    latent_E, bits_E = _tries(acts, n, seed)
    firing_E = acts.starts_M[latent_E] + uniform_below(bits_E, acts.counts_M[latent_E])
    token_E = corpus.tokens[acts.row_S[firing_E]].astype(np.int64)
    rows, ends = corpus.occurrences
    n_E = ends[token_E + 1] - ends[token_E]
    at_E = ends[token_E] + uniform_below(hash_random(bits_E, 1, seed), n_E)
    some_E = n_E > 0  # of a very long text not every occurrence is listed
    row_E = rows[np.where(some_E, at_E, 0)].astype(np.int64)
    return _silent(acts, corpus, latent_E[some_E], row_E[some_E], n=n, window=window)


def silent(acts: Activations, corpus: Corpus, *, n: int, window: int, seed: int) -> tuple[Ints, Ints]:
    """``(latent, row)``, at most ``n`` rows a latent: any place in a window without firing."""
    latent_E, bits_E = _tries(acts, n, seed)
    row_E = uniform_below(hash_random(bits_E, 2, seed), corpus.n_rows)
    return _silent(acts, corpus, latent_E, row_E, n=n, window=window)


def _tries(acts: Activations, n: int, seed: int) -> tuple[Ints, NDArray[np.uint64]]:
    alive_L = np.flatnonzero(acts.counts_M)
    latent_E = np.repeat(alive_L, TRIES * n)
    return latent_E, hash_random(latent_E + acts.first, np.tile(np.arange(TRIES * n), len(alive_L)), seed)


def _silent(
    acts: Activations, corpus: Corpus, latent_E: Ints, row_E: Ints, *, n: int, window: int
) -> tuple[Ints, Ints]:
    """The first ``n`` different rows of each latent in whose windows it does not fire."""
    if corpus.has_units:
        low_E, high_E = Windows(acts, corpus, latent_E, row_E, window).fired_E
        silent_E = low_E == high_E
    else:
        key_S = acts.latent_S * corpus.n_rows + acts.row_S
        key_E = latent_E * corpus.n_rows + row_E
        silent_E = key_S[np.minimum(np.searchsorted(key_S, key_E), len(key_S) - 1)] != key_E
    latent_E, row_E = latent_E[silent_E], row_E[silent_E]
    _, first = np.unique(latent_E * corpus.n_rows + row_E, return_index=True)
    first.sort()
    latent_E, row_E = latent_E[first], row_E[first]
    kept = np.arange(len(latent_E)) - np.searchsorted(latent_E, latent_E) < n
    return latent_E[kept], row_E[kept]
