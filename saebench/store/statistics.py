"""What the activations of each latent look like: counts, moments, quantiles, histograms, tokens.

Shapes: S activations of a group of M latents (runs.Activations), L of them alive, P pairs (latent, token).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from saebench.store.corpus import Corpus
from saebench.store.runs import Activations
from saebench.store.schema import DENSE_ABOVE, HIST_BINS, TOKENS_PER_FEATURE
from saebench.store.text import token_text

Columns = dict[str, Any]

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def activation_statistics(acts: Activations, corpus: Corpus) -> Columns:
    """The columns of the feature table that come from activations, one entry a latent of the group."""
    n_M = acts.counts_M
    alive_L = np.flatnonzero(n_M)
    n_L, starts_L = n_M[alive_L], _starts(n_M)[alive_L]
    statistics: dict[str, NDArray[np.float64]] = {}
    if len(alive_L):
        values_S = acts.value_S.astype(np.float64)
        mean_L = np.add.reduceat(values_S, starts_L) / n_L
        squares_L = np.add.reduceat((values_S - np.repeat(mean_L, n_L)) ** 2, starts_L)
        statistics["mean_act"], statistics["std_act"] = mean_L, np.sqrt(squares_L / n_L)
        ascending_S = sorted_within_latent(acts.latent_S, acts.value_S).astype(np.float64)
        statistics["max_act"] = ascending_S[starts_L + n_L - 1]
        for name, q in QUANTILES.items():
            statistics[name] = _quantile(ascending_S, starts_L, n_L, q)
    columns: Columns = {"n_act": n_M, "density": n_M / corpus.n_rows, "dead": n_M == 0}
    columns["dense"] = columns["density"] > DENSE_ABOVE
    for name in ("max_act", "mean_act", "std_act", *QUANTILES):
        column_M = np.zeros(acts.n_latents, dtype=np.float32)
        if len(alive_L):
            column_M[alive_L] = statistics[name]
        columns[name] = column_M
    columns["n_ctx_act"] = columns["n_doc_act"] = [None] * acts.n_latents
    if corpus.has_text:
        columns["n_ctx_act"] = _distinct(acts, corpus.ctx[acts.row_S], corpus.n_contexts)
        columns["n_doc_act"] = _distinct(acts, corpus.doc[acts.row_S], corpus.n_documents)
    return columns


def histograms(acts: Activations) -> Columns:
    """Rows of the hist table: HIST_BINS bins of equal width from 0 (or below) to the largest activation."""
    n_M = acts.counts_M
    alive_L = np.flatnonzero(n_M)
    starts_L, n_L = _starts(n_M)[alive_L], n_M[alive_L]
    if not len(alive_L):
        return {"feature": alive_L, "lo": [], "hi": [], "counts": []}
    lo_L = np.minimum(np.minimum.reduceat(acts.value_S, starts_L), 0)
    hi_L = np.maximum(np.maximum.reduceat(acts.value_S, starts_L), 0)
    which_S = np.repeat(np.arange(len(alive_L)), n_L)
    bin_S = bins(acts.value_S, lo_L[which_S], hi_L[which_S])
    counts = np.bincount(which_S * HIST_BINS + bin_S, minlength=len(alive_L) * HIST_BINS)
    return {"feature": alive_L + acts.first, "lo": lo_L, "hi": hi_L, "counts": list_column(counts, HIST_BINS)}


def bins(
    value_S: NDArray[np.float32], lo_S: NDArray[np.float32], hi_S: NDArray[np.float32]
) -> NDArray[np.int64]:
    """The bin of each activation; the last one includes its right edge."""
    low, high = lo_S.astype(np.float64), hi_S.astype(np.float64)
    share = (value_S.astype(np.float64) - low) / (high - low)
    return np.minimum((share * HIST_BINS).astype(np.int64), HIST_BINS - 1)


def token_statistics(acts: Activations, corpus: Corpus) -> tuple[Columns, Columns]:
    """``(rows of feature_token, columns of feature)``: on which tokens each latent of the group fires."""
    n_tokens = len(corpus.vocab)
    key_P, n_P = np.unique(acts.latent_S * n_tokens + corpus.tokens[acts.row_S], return_counts=True)
    latent_P, token_P = key_P // n_tokens, key_P % n_tokens
    order = np.lexsort((token_P, -n_P, latent_P))
    latent_P, token_P, n_P = latent_P[order], token_P[order], n_P[order]
    n_act_M = acts.counts_M
    share_P = n_P / n_act_M[latent_P]
    first_M = np.searchsorted(latent_P, np.arange(acts.n_latents))
    rank_P = np.arange(len(latent_P)) - first_M[latent_P]
    columns: Columns = dict(zip(("top_token", "top_token_share", "entropy_tok"), _top(
        latent_P, token_P, share_P, first_M, n_act_M > 0, corpus.vocab), strict=True))  # fmt: skip
    kept = rank_P < TOKENS_PER_FEATURE
    latent_P, token_P, n_P, share_P, rank_P = (a[kept] for a in (latent_P, token_P, n_P, share_P, rank_P))
    total_P = corpus.token_counts[token_P]
    rows = {
        "feature": latent_P + acts.first, "rank": rank_P, "token": token_P, "n": n_P,
        "p_token_given_fire": share_P, "p_fire_given_token": n_P / total_P,
        "lift": share_P / (total_P / corpus.n_rows),
    }  # fmt: skip
    return rows, columns


def sorted_within_latent(latent_S: NDArray[np.integer], value_S: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values ascending within each latent; one sort of 64-bit keys is ten times faster than lexsort."""
    keys = np.sort(latent_S.astype(np.uint64) << np.uint64(32) | ordered_bits(value_S))
    return _from_ordered_bits(keys.astype(np.uint32))


def ordered_bits(value_S: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Integers in the order of the floats."""
    bits = np.ascontiguousarray(value_S, dtype=np.float32).view(np.uint32)
    return bits ^ np.where(bits >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))


def list_column(flat: NDArray[Any], lengths: int | NDArray[np.integer]) -> Any:
    """An Arrow column of lists that lie end to end in ``flat``."""
    import pyarrow

    if isinstance(lengths, int):
        ends = np.arange(0, len(flat) + 1, lengths)
    else:
        ends = np.concatenate([[0], np.cumsum(lengths)])
    return pyarrow.ListArray.from_arrays(pyarrow.array(ends.astype(np.int32)), pyarrow.array(flat))


def _top(
    latent_P: NDArray[np.int64], token_P: NDArray[np.int64], share_P: NDArray[np.float64],
    first_M: NDArray[np.int64], alive_M: NDArray[np.bool_], vocab: list[bytes],
) -> tuple[list[str | None], list[float | None], list[float | None]]:  # fmt: skip
    bits_P = -share_P * np.log2(share_P)
    entropy_M = np.bincount(latent_P, weights=bits_P, minlength=len(first_M))
    top: list[tuple[str | None, float | None, float | None]] = [
        (token_text(vocab[token_P[first]]), float(share_P[first]), max(float(entropy), 0.0))
        if alive else (None, None, None)
        for first, alive, entropy in zip(first_M, alive_M, entropy_M, strict=True)
    ]  # fmt: skip
    return [t for t, _, _ in top], [s for _, s, _ in top], [e for _, _, e in top]


def _distinct(acts: Activations, other_S: NDArray[np.integer], n_other: int) -> NDArray[np.int64]:
    """[M]: how many different values of ``other_S`` each latent meets."""
    key_S = np.sort(acts.latent_S * n_other + other_S)
    if len(key_S):
        key_S = key_S[np.concatenate([[True], key_S[1:] != key_S[:-1]])]
    return np.bincount(key_S // max(n_other, 1), minlength=acts.n_latents)


def _quantile(
    ascending_S: NDArray[np.float64], starts_L: NDArray[np.int64], n_L: NDArray[np.int64], q: float
) -> NDArray[np.float64]:
    """Linear between the two nearest, like numpy.quantile."""
    at_L = (n_L - 1) * q
    below_L = np.floor(at_L).astype(np.int64)
    above_L = np.minimum(below_L + 1, n_L - 1)
    low, high = ascending_S[starts_L + below_L], ascending_S[starts_L + above_L]
    quantile_L: NDArray[np.float64] = low + (high - low) * (at_L - below_L)
    return quantile_L


def _from_ordered_bits(ordered_S: NDArray[np.uint32]) -> NDArray[np.float32]:
    return (ordered_S ^ np.where(ordered_S >> 31, np.uint32(0x80000000), np.uint32(0xFFFFFFFF))).view(
        np.float32
    )


def _starts(n_M: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(n_M)[:-1]])
