"""Baselines for a language model: unigram and bigram models of token counts.

    unigram   p(w)     = (c(w) + 1) / (N + V)
    bigram    p(w | v) = a(v) c(v, w) / c(v) + (1 - a(v)) p(w),   a(v) = c(v) / (c(v) + kappa t(v))

c counts tokens and neighboring pairs, N is the number of tokens, V the size of the vocabulary and t(v) the
number of distinct tokens seen after v. kappa = 1 is the interpolation of Witten and Bell (1991); `tune_kappa`
chooses it on text that is not counted. Losses are negative log probabilities, in nats.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

KAPPAS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)


class Bigram:
    """Unigram and interpolated bigram models of token streams.

    `documents` are integer arrays of token ids below `vocab_size`.
    """

    def __init__(self, documents: Sequence[np.ndarray], *, vocab_size: int, kappa: float = 1.0) -> None:
        self.vocab_size, self.kappa = vocab_size, kappa
        counts_V = np.bincount(np.concatenate(documents), minlength=vocab_size)
        self._unigram_V = (counts_V + 1) / (counts_V.sum() + vocab_size)
        keys = np.concatenate([self._key(document[:-1], document[1:]) for document in documents])
        self._keys, self._pair_counts = np.unique(keys, return_counts=True)
        first = self._keys // vocab_size
        self._followed_V = np.bincount(first, weights=self._pair_counts, minlength=vocab_size)
        self._types_V = np.bincount(first, minlength=vocab_size)
        # A last key that no pair has, so that every search returns a valid index.
        self._keys = np.append(self._keys, vocab_size**2)
        self._pair_counts = np.append(self._pair_counts, 0)

    def _key(self, previous: np.ndarray, token: np.ndarray) -> np.ndarray:
        key: np.ndarray = previous.astype(np.int64) * self.vocab_size + token
        return key

    def unigram_losses(self, contexts_CT: np.ndarray) -> np.ndarray:
        """Unigram loss [C, T - 1] of every token except the first of each context."""
        losses_CT: np.ndarray = -np.log(self._unigram_V[contexts_CT[:, 1:]])
        return losses_CT

    def losses(self, contexts_CT: np.ndarray) -> np.ndarray:
        """Bigram loss [C, T - 1] of every token but the first of each context, given the previous token."""
        previous, token = contexts_CT[:, :-1], contexts_CT[:, 1:]
        key = self._key(previous, token)
        at = np.searchsorted(self._keys, key)
        pair_count = np.where(self._keys[at] == key, self._pair_counts[at], 0)
        followed = self._followed_V[previous]
        # a(v) c(v, w) / c(v) = c(v, w) / (c(v) + kappa t(v)); a token never followed by another has a(v) = 0.
        mass = np.maximum(followed + self.kappa * self._types_V[previous], 1)
        weight = followed / mass
        losses_CT: np.ndarray = -np.log(pair_count / mass + (1 - weight) * self._unigram_V[token])
        return losses_CT

    def tune_kappa(self, contexts_CT: np.ndarray) -> float:
        """Set kappa to the value of KAPPAS with the lowest mean loss on these contexts, and return it."""

        def loss(kappa: float) -> float:
            self.kappa = kappa
            return float(self.losses(contexts_CT).mean())

        self.kappa = min(KAPPAS, key=loss)
        return self.kappa
