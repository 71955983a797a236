"""The window of text around a token, with the activations of a latent in it.

Shapes: S activations of a group of latents, E places (a latent and a row each), X tokens of all windows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saebench.store.corpus import Corpus
from saebench.store.sorted_spill import Activations
from saebench.store.statistics import list_column

BEFORE = 2 / 3
"""Fraction of a window that is before its token; a causal model has read only this part."""


@dataclass(frozen=True)
class Windows:
    """Windows of ``window`` tokens around rows of a text, each looked at by one latent of a group."""

    acts: Activations
    corpus: Corpus
    latent_E: NDArray[np.int64]
    row_E: NDArray[np.int64]
    window: int

    @functools.cached_property
    def ctx_E(self) -> NDArray[np.int64]:
        return self.corpus.ctx[self.row_E].astype(np.int64)

    @functools.cached_property
    def pos_E(self) -> NDArray[np.int64]:
        return self.corpus.pos[self.row_E].astype(np.int64)

    @functools.cached_property
    def start_E(self) -> NDArray[np.int64]:
        """Position of the first token."""
        room_E = np.maximum(self.corpus.context_len[self.ctx_E].astype(np.int64) - self.window, 0)
        return np.clip(self.pos_E - int(self.window * BEFORE), 0, room_E)

    @functools.cached_property
    def length_E(self) -> NDArray[np.int64]:
        left_E = self.corpus.context_len[self.ctx_E].astype(np.int64) - self.start_E
        length_E: NDArray[np.int64] = np.minimum(left_E, self.window)
        return length_E

    @functools.cached_property
    def fired_E(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``(low, high)``: which of the group's activations lie in the window."""
        corpus, acts = self.corpus, self.acts
        places = corpus.n_contexts * corpus.ctx_len
        key_S = acts.latent_S * places + corpus.place(acts.row_S)
        key_E = self.latent_E * places + self.ctx_E * corpus.ctx_len + self.start_E
        order = np.argsort(key_E, kind="stable")  # searching in order stays in the processor's caches
        found = np.empty((2, len(key_E)), dtype=np.int64)
        found[0, order] = np.searchsorted(key_S, key_E[order])
        found[1, order] = np.searchsorted(key_S, (key_E + self.length_E)[order])
        return found[0], found[1]

    def columns(self) -> dict[str, Any]:
        """ctx, pos, doc, start, tokens and acts of the example table; without text, no doc and no tokens."""
        corpus, length_E = self.corpus, self.length_E
        ends_E = np.cumsum(length_E)
        example_X = np.repeat(np.arange(len(length_E)), length_E)
        offset_X = np.arange(len(example_X)) - np.repeat(ends_E - length_E, length_E)
        low_E, high_E = self.fired_E
        n_E = high_E - low_E
        example_Y = np.repeat(np.arange(len(n_E)), n_E)
        at_Y = np.arange(len(example_Y)) - np.repeat(np.cumsum(n_E) - n_E, n_E) + np.repeat(low_E, n_E)
        pos_Y = corpus.pos[self.acts.row_S[at_Y]].astype(np.int64)
        acts_X = np.zeros(len(example_X), dtype=np.float32)
        acts_X[(ends_E - length_E)[example_Y] + pos_Y - self.start_E[example_Y]] = self.acts.value_S[at_Y]
        return {
            "ctx": self.ctx_E,
            "pos": self.pos_E,
            "start": self.start_E,
            "acts": list_column(acts_X, length_E),
            **self._words(example_X, self.start_E[example_X] + offset_X),
        }

    def _words(self, example_X: NDArray[np.int64], pos_X: NDArray[np.int64]) -> dict[str, Any]:
        import pyarrow

        n = len(self.row_E)
        if not self.corpus.has_text:
            empty = pyarrow.array([[]] * n, type=pyarrow.list_(pyarrow.uint32()))
            return {"doc": pyarrow.nulls(n, pyarrow.uint32()), "tokens": empty}
        tokens_X = self.corpus.context_tokens[self.ctx_E[example_X], pos_X]
        return {"doc": self.corpus.doc[self.row_E], "tokens": list_column(tokens_X, self.length_E)}
