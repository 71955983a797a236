"""Statistics of the activations of each latent: counts, moments, quantiles, histograms, positions.

Shapes: S activations of a group of M latents (runs.Activations), L of them alive.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from saebench.store.corpus import Corpus
from saebench.store.schema import DENSE_ABOVE, HIST_BINS, HIST_KINDS, QUANTILE_GRID
from saebench.store.sorted_spill import Activations

Columns = dict[str, Any]

QUANTILES = {"p10": 0.1, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99}
MOMENTS = ("mean_act", "std_act", "skew", "kurtosis")


def activation_statistics(acts: Activations, corpus: Corpus) -> Columns:
    """The columns of the feature table that derive from activations, one entry per latent of the group."""
    n_M = acts.counts_M
    alive_L = np.flatnonzero(n_M)
    columns: Columns = {"n_act": n_M, "density": n_M / corpus.n_rows, "dead": n_M == 0}
    columns["dense"] = columns["density"] > DENSE_ABOVE
    statistics = dict.fromkeys(("max_act", *MOMENTS, *QUANTILES), np.empty(0))
    if len(alive_L):
        statistics |= _moments(acts, alive_L)
        statistics["max_act"] = acts.ascending_S[acts.starts_M[alive_L] + n_M[alive_L] - 1]
        statistics |= {name: _quantile(acts, alive_L, q) for name, q in QUANTILES.items()}
    for name, of_L in statistics.items():
        columns[name] = np.zeros(acts.n_latents, dtype=np.float32)
        columns[name][alive_L] = of_L
    none = [None] * acts.n_latents
    columns |= dict.fromkeys(("n_ctx_act", "n_doc_act", "mean_pos", "first_pos_share"), none)
    if corpus.has_units:
        columns |= _places(acts, corpus, alive_L)
    return columns


def quantile_rows(acts: Activations) -> Columns:
    """Rows of the quantile table."""
    alive_L = np.flatnonzero(acts.counts_M)
    qs_LQ = np.empty((len(alive_L), len(QUANTILE_GRID)), dtype=np.float32)
    for column, q in enumerate(QUANTILE_GRID):
        qs_LQ[:, column] = _quantile(acts, alive_L, q)
    return {"feature": alive_L + acts.first, "qs": list_column(qs_LQ.reshape(-1), len(QUANTILE_GRID))}


def position_rows(acts: Activations, corpus: Corpus) -> Columns:
    """Rows of the position table."""
    alive_L = np.flatnonzero(acts.counts_M)
    n = corpus.n_buckets
    counts = np.bincount(acts.latent_S * n + corpus.bucket(acts.row_S), minlength=acts.n_latents * n)
    counts_LP = counts.reshape(-1, n)[alive_L]
    return {"feature": alive_L + acts.first, "counts": list_column(counts_LP.reshape(-1), n)}


def histograms(acts: Activations) -> Columns:
    """Rows of the hist table, HIST_BINS bins of equal width each.

    Of the activations, from 0 (or below) to the largest one; of log10 of the positive ones, from the
    smallest to the largest.
    """
    alive_L = np.flatnonzero(acts.counts_M)
    if not len(alive_L):
        return {"feature": alive_L, "kind": [], "lo": [], "hi": [], "counts": []}
    starts_L = acts.starts_M[alive_L]
    low_L = np.minimum(np.minimum.reduceat(acts.value_S, starts_L), 0)
    high_L = np.maximum(np.maximum.reduceat(acts.value_S, starts_L), 0)
    value = _histogram(acts.latent_S, acts.value_S, alive_L, low_L, high_L)
    positive_S = acts.value_S > 0
    latent_S, value_S = acts.latent_S, acts.value_S
    if not positive_S.all():
        latent_S, value_S = latent_S[positive_S], value_S[positive_S]
    value_S = np.log10(value_S)
    n_M = np.bincount(latent_S, minlength=acts.n_latents)
    some_L = np.flatnonzero(n_M)
    log: Columns = {name: column[:0] for name, column in value.items()}
    if len(some_L):
        starts_L = (np.cumsum(n_M) - n_M)[some_L]
        low_L, high_L = np.minimum.reduceat(value_S, starts_L), np.maximum.reduceat(value_S, starts_L)
        log = _histogram(latent_S, value_S, some_L, low_L, high_L)
    kind = np.repeat(list(HIST_KINDS.values()), [len(value["feature"]), len(log["feature"])])
    rows = {name: np.concatenate([value[name], log[name]]) for name in value} | {"kind": kind}
    order = np.lexsort((rows["kind"], rows["feature"]))
    rows = {name: column[order] for name, column in rows.items()}
    rows["feature"] += acts.first
    return rows | {"counts": list_column(rows["counts"].reshape(-1), HIST_BINS)}


def _histogram(
    latent_S: NDArray[np.int64],
    value_S: NDArray[np.float32],
    alive_L: NDArray[np.int64],
    low_L: NDArray[np.float32],
    high_L: NDArray[np.float32],
) -> Columns:
    """feature, lo, hi [L] and counts [L, HIST_BINS]."""
    place_M = np.zeros(alive_L[-1] + 1, dtype=np.int64)
    place_M[alive_L] = np.arange(len(alive_L))
    which_S = place_M[latent_S]
    bin_S = bins(value_S, low_L[which_S], high_L[which_S])
    counts = np.bincount(which_S * HIST_BINS + bin_S, minlength=len(alive_L) * HIST_BINS)
    return {"feature": alive_L, "lo": low_L, "hi": high_L, "counts": counts.reshape(-1, HIST_BINS)}


def bins(
    value_S: NDArray[np.float32], lo_S: NDArray[np.float32], hi_S: NDArray[np.float32]
) -> NDArray[np.int64]:
    """The bin of each activation; the last one includes its right edge."""
    low, high = lo_S.astype(np.float64), hi_S.astype(np.float64)
    share = (value_S.astype(np.float64) - low) / np.where(high > low, high - low, 1)
    return np.minimum((share * HIST_BINS).astype(np.int64), HIST_BINS - 1)


def list_column(flat: NDArray[Any], lengths: int | NDArray[np.integer]) -> Any:
    """An Arrow column of lists that lie end to end in ``flat``."""
    import pyarrow

    if isinstance(lengths, int):
        ends = np.arange(0, len(flat) + 1, lengths)
    else:
        ends = np.concatenate([[0], np.cumsum(lengths)])
    return pyarrow.ListArray.from_arrays(pyarrow.array(ends.astype(np.int32)), pyarrow.array(flat))


def _moments(acts: Activations, alive_L: NDArray[np.int64]) -> Columns:
    """MOMENTS [L] over the tokens on which each latent fires."""
    n_L, starts_L = acts.counts_M[alive_L], acts.starts_M[alive_L]
    values_S = acts.value_S.astype(np.float64)
    mean_L = np.add.reduceat(values_S, starts_L) / n_L
    centered_S = values_S - np.repeat(mean_L, n_L)
    power_S = centered_S * centered_S
    variance_L = np.add.reduceat(power_S, starts_L) / n_L
    power_S *= centered_S
    third_L = np.add.reduceat(power_S, starts_L) / n_L
    power_S *= centered_S
    fourth_L = np.add.reduceat(power_S, starts_L) / n_L
    varies_L = variance_L > 1e-12 * mean_L**2
    safe_L = np.where(varies_L, variance_L, 1)
    return {
        "mean_act": mean_L,
        "std_act": np.sqrt(variance_L),
        "skew": np.where(varies_L, third_L / safe_L**1.5, 0),
        "kurtosis": np.where(varies_L, fourth_L / safe_L**2 - 3, 0),
    }


def _places(acts: Activations, corpus: Corpus, alive_L: NDArray[np.int64]) -> Columns:
    """In how many contexts and documents each latent fires, and where in its contexts."""
    n_L, starts_L = acts.counts_M[alive_L], acts.starts_M[alive_L]
    columns: Columns = {
        "n_ctx_act": _distinct(acts, corpus.ctx[acts.row_S], corpus.n_contexts, ascend=True),
    }
    if corpus.has_text:
        doc_S = corpus.doc[acts.row_S]
        columns["n_doc_act"] = _distinct(acts, doc_S, corpus.n_documents, ascend=corpus.docs_ascend)
    where = {"mean_pos": corpus.pos[acts.row_S], "first_pos_share": corpus.is_first(acts.row_S)}
    for name, of_S in where.items():
        columns[name] = np.full(acts.n_latents, None, dtype=object)
        if len(alive_L):
            columns[name][alive_L] = np.add.reduceat(of_S.astype(np.float64), starts_L) / n_L
    return columns


def _distinct(
    acts: Activations, other_S: NDArray[np.integer], n_other: int, *, ascend: bool
) -> NDArray[np.int64]:
    """[M]: how many different values of ``other_S`` each latent meets; ``ascend``: they do in each latent."""
    key_S = acts.latent_S * n_other + other_S
    if not ascend:
        key_S = np.sort(key_S)
    if len(key_S):
        key_S = key_S[np.concatenate([[True], key_S[1:] != key_S[:-1]])]
    return np.bincount(key_S // max(n_other, 1), minlength=acts.n_latents)


def _quantile(acts: Activations, alive_L: NDArray[np.int64], q: float) -> NDArray[np.float64]:
    """[L]: linear between the two nearest activations, like numpy.quantile."""
    n_L, starts_L = acts.counts_M[alive_L], acts.starts_M[alive_L]
    at_L = (n_L - 1) * q
    below_L = np.floor(at_L).astype(np.int64)
    above_L = np.minimum(below_L + 1, n_L - 1)
    low = acts.ascending_S[starts_L + below_L].astype(np.float64)
    high = acts.ascending_S[starts_L + above_L].astype(np.float64)
    quantile_L: NDArray[np.float64] = low + (high - low) * (at_L - below_L)
    return quantile_L
