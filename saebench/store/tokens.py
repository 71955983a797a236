"""Tables of tokens per latent (at, before and after its firings), labels per latent, and latents per token.

Shapes: S activations of a group of M latents (runs.Activations), P pairs of a latent and a token, V tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from saebench.store.corpus import Corpus
from saebench.store.schema import FEATURES_PER_TOKEN, LABELS_PER_FEATURE, TOKEN_ROLES, TOKENS_PER_FEATURE
from saebench.store.sorted_spill import Activations, ordered_bits
from saebench.store.text import token_text

Columns = dict[str, Any]
Ints = NDArray[np.int64]


def token_statistics(acts: Activations, corpus: Corpus, inverse: TokenFeatures) -> tuple[Columns, Columns]:
    """``(rows of feature_token, columns of feature)``; the group is also added to ``inverse``."""
    parts: list[Columns] = []
    columns: Columns = {}
    for role in TOKEN_ROLES.values():
        latent_P, token_P, n_P = _pairs(acts, corpus.tokens_at(acts.row_S, role), len(corpus.vocab))
        row_P = _shares(acts, corpus, latent_P, token_P, n_P, role)
        rank_P = _rank(latent_P)
        if role == TOKEN_ROLES["active"]:
            columns = _top(acts, latent_P, row_P, corpus.vocab)
            inverse.add(row_P)
        kept_P = rank_P < TOKENS_PER_FEATURE
        rows = {name: column[kept_P] for name, column in row_P.items()}
        parts.append({**rows, "rank": rank_P[kept_P], "role": np.full(int(kept_P.sum()), role)})
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((rows["rank"], rows["role"], rows["feature"]))
    return {name: column[order] for name, column in rows.items()}, columns


def label_rows(acts: Activations, corpus: Corpus) -> Columns:
    """Rows of the feature_label table."""
    labels_S = corpus.label_of_doc[corpus.doc[acts.row_S]]
    latent_P, label_P, n_P = _pairs(acts, labels_S, len(corpus.label_names))
    rank_P = _rank(latent_P)
    kept_P = rank_P < LABELS_PER_FEATURE
    latent_P, label_P, n_P, rank_P = latent_P[kept_P], label_P[kept_P], n_P[kept_P], rank_P[kept_P]
    share_P = n_P / acts.counts_M[latent_P]
    return {
        "feature": latent_P + acts.first,
        "rank": rank_P,
        "n": n_P,
        "p_label_given_fire": share_P,
        "label": [corpus.label_names[label] for label in label_P],
        "lift": share_P / (corpus.label_counts[label_P] / corpus.n_rows),
    }


class TokenFeatures:
    """The table token_feature, gathered from groups of latents in ascending order."""

    def __init__(self) -> None:
        self._kept: Columns = {}

    def add(self, row_P: Columns) -> None:
        """Take the pairs of one more group: columns feature, token, n, ... of feature_token."""
        if self._kept:
            row_P = {name: np.concatenate([self._kept[name], row_P[name]]) for name in self._kept}
        with np.errstate(divide="ignore"):
            evidence_P = (row_P["n"] * np.log(row_P["lift"])).astype(np.float32)
        key_P = row_P["token"].astype(np.uint64) << np.uint64(32) | ~ordered_bits(evidence_P)
        order = np.argsort(key_P, kind="stable")
        order = order[_rank(row_P["token"][order]) < FEATURES_PER_TOKEN]
        self._kept = {name: column[order] for name, column in row_P.items()}

    def rows(self) -> Columns:
        """Rows of the table."""
        return {**self._kept, "rank": _rank(self._kept["token"])}


def _pairs(acts: Activations, other_S: Ints, n_other: int) -> tuple[Ints, Ints, Ints]:
    """``(latent, other, times)`` of the pairs that occur, by latent and descending times; -1: no other."""
    key_S = acts.latent_S * n_other + other_S
    if (other_S < 0).any():
        key_S = key_S[other_S >= 0]
    key_S.sort(kind="stable")
    starts_P = np.flatnonzero(np.concatenate([[True], key_S[1:] != key_S[:-1]])) if len(key_S) else key_S
    n_P = np.diff(starts_P, append=len(key_S))
    latent_P, other_P = np.divmod(key_S[starts_P], n_other)
    order = np.argsort(latent_P << 32 | (1 << 32) - 1 - n_P, kind="stable")
    return latent_P[order], other_P[order], n_P[order]


def _shares(
    acts: Activations, corpus: Corpus, latent_P: Ints, token_P: Ints, n_P: Ints, role: int
) -> Columns:
    share_P = n_P / acts.counts_M[latent_P]
    total_P = corpus.role_counts[role][token_P]
    return {
        "feature": latent_P + acts.first,
        "token": token_P,
        "n": n_P,
        "p_token_given_fire": share_P,
        "p_fire_given_token": n_P / total_P,
        "lift": share_P / (total_P / corpus.n_rows),
    }


def _top(acts: Activations, latent_P: Ints, row_P: Columns, vocab: list[bytes]) -> Columns:
    """Columns of the feature table about the tokens of each latent; None for a dead one."""
    share_P = row_P["p_token_given_fire"]
    entropy_M = np.bincount(latent_P, weights=-share_P * np.log2(share_P), minlength=acts.n_latents)
    alive_L = np.flatnonzero(acts.counts_M)
    first_L = np.searchsorted(latent_P, alive_L)
    found = {
        "top_token": [token_text(vocab[token]) for token in row_P["token"][first_L]],
        "top_token_share": share_P[first_L],
        "top_token_p_fire": row_P["p_fire_given_token"][first_L],
        "entropy_tok": np.maximum(entropy_M[alive_L], 0),
    }
    columns = {name: np.full(acts.n_latents, None, dtype=object) for name in found}
    for name, of_L in found.items():
        columns[name][alive_L] = of_L
    return columns


def _rank(sorted_P: NDArray[Any]) -> Ints:
    """The place of each entry among its equals, which lie together."""
    new_P = np.ones(len(sorted_P), dtype=bool)
    new_P[1:] = sorted_P[1:] != sorted_P[:-1]
    starts = np.flatnonzero(new_P)
    return np.arange(len(sorted_P)) - np.repeat(starts, np.diff(starts, append=len(sorted_P)))
