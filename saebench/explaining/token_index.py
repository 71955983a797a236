"""TokenIndex: all tokens that the SAE of a store was run on, and the tokens at which an atom or a rule holds.

Shapes: N rows (tokens that were encoded), V tokens of the vocabulary, C contexts, A classes, R some rows.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from saebench.core.errors import UserError
from saebench.explaining.grammar import (
    AFFIXES,
    CLASSES,
    OFFSETS,
    Atom,
    Rule,
    holds_for_text,
    text_of,
    word_of,
)
from saebench.store.folds import TEST, TRAIN, fold_of
from saebench.store.scan import read_activations, read_contexts, read_token_counts

if TYPE_CHECKING:
    from saebench.store.query import FeatureStore

Rows = NDArray[np.int64]


class TokenIndex:
    """The rows of a store's text.

    Attributes:
        token_N: for each offset, the token there; V where the context has none.
        ctx_N, pos_N, doc_N, fold_N: context, position in it, document, and fold of the document.
        repeated_N: whether the same token occurs earlier in the context.
        rows: for each fold, its rows.

    Raises:
        UserError: the store has no contexts, or its rows are not those of whole contexts.
    """

    def __init__(self, store: FeatureStore) -> None:
        tokens_X, docs_X, length_C = read_contexts(store)
        counts_V = read_token_counts(store)
        self.vocab = store.vocab
        self._start_C = np.concatenate([[0], np.cumsum(length_C)[:-1]])
        pos_X = np.arange(len(tokens_X)) - np.repeat(self._start_C, length_C)
        last_X = np.repeat(length_C, length_C) - 1 - pos_X
        keep_X = _rows_of_the_cache(store, tokens_X, pos_X, last_X, counts_V)
        self._row_X = np.cumsum(keep_X, dtype=np.int64) - 1
        self._keep_X = keep_X
        self.token_N: dict[int, NDArray[np.int32]] = {}
        for offset in OFFSETS:
            there_X = np.full(len(tokens_X), len(self.vocab), dtype=np.int32)
            there_X[-offset:] = tokens_X[: len(tokens_X) + offset]
            there_X[pos_X < -offset] = len(self.vocab)
            self.token_N[offset] = there_X[keep_X]
        self.ctx_N = np.repeat(np.arange(len(length_C)), length_C)[keep_X]
        self.pos_N = pos_X[keep_X].astype(np.int32)
        self.doc_N = docs_X[keep_X]
        self.fold_N = fold_of(self.doc_N)
        self.repeated_N = _repeated(tokens_X, np.repeat(np.arange(len(length_C)), length_C))[keep_X]
        self.rows: tuple[Rows, ...] = tuple(np.flatnonzero(self.fold_N == fold) for fold in (TRAIN, TEST))
        self._indices: dict[tuple[int, int], tuple[Rows, NDArray[np.int64]]] = {}

    @property
    def n_rows(self) -> int:
        return len(self.pos_N)

    def row_of(self, ctx_R: Rows, pos_R: Rows) -> Rows:
        """The row of each (context, position)."""
        place_R = self._start_C[ctx_R] + pos_R
        assert self._keep_X[place_R].all()
        return self._row_X[place_R]

    def firings(self, store: FeatureStore, first: int, stop: int) -> list[tuple[Rows, NDArray[np.float32]]]:
        """Rows on which each of the features ``first`` to ``stop - 1`` fires, and its activations there."""
        feature_S, ctx_S, pos_S, value_S = read_activations(store, first, stop)
        row_S = self.row_of(ctx_S, pos_S)
        ends = np.searchsorted(feature_S, np.arange(first, stop + 1))
        return [(row_S[a:b], value_S[a:b]) for a, b in itertools.pairwise(ends)]

    # What tokens are

    @functools.cached_property
    def texts(self) -> list[str]:
        return [text_of(token) for token in self.vocab]

    @functools.cached_property
    def classes_VA(self) -> NDArray[np.float64]:
        """[V + 1, A]: 1 where the token is of the class; the last row is "no token"."""
        patterns = [re.compile(pattern) for pattern in CLASSES.values()]
        rows = [[pattern.fullmatch(text) is not None for pattern in patterns] for text in self.texts]
        return np.array([*rows, [False] * len(patterns)], dtype=np.float64)

    @functools.cached_property
    def categories(self) -> dict[tuple[str, int], tuple[NDArray[np.int64], list[str]]]:
        """(kind of atom, length of affix) -> (number of each token's value, 0 for none; the values)."""
        words = [word_of(text) for text in self.texts]
        found = {("word", 0): _numbered([word or None for word in words])}
        for length in AFFIXES["begins"]:
            found["begins", length] = _numbered([w[:length] if len(w) > length else None for w in words])
        for length in AFFIXES["ends"]:
            found["ends", length] = _numbered([w[-length:] if len(w) > length else None for w in words])
        return found

    def tokens_of(self, atom: Atom) -> NDArray[np.bool_]:
        """[V + 1]: for which tokens an atom with ``at`` holds."""
        mask_V = np.zeros(len(self.vocab) + 1, dtype=bool)
        if "in" in atom:
            mask_V[[token for token in atom["in"] if 0 <= token < len(self.vocab)]] = True
        elif "is" in atom:
            mask_V[:] = self.classes_VA[:, list(CLASSES).index(atom["is"])] > 0
        else:
            [kind] = set(atom) - {"at"}
            length = 0 if kind == "word" else len(atom[kind])
            if (kind, length) in self.categories:
                number_V, values = self.categories[kind, length]
                if atom[kind] in values:
                    mask_V[:] = number_V == values.index(atom[kind])
            else:
                mask_V[:-1] = [holds_for_text(atom, text) for text in self.texts]
        mask_V[-1] = False
        return mask_V

    # Where rules hold

    def holds(self, atom: Atom, row_R: Rows) -> NDArray[np.bool_]:
        """[R]: whether the atom holds at each row."""
        if "position" in atom:
            low, high = atom["position"]
            pos_R = self.pos_N[row_R]
            low, high = -1 if low is None else low, 2**31 - 1 if high is None else high
            inside_R: NDArray[np.bool_] = (pos_R >= low) & (pos_R <= high)
            return inside_R
        if "repeated" in atom:
            return self.repeated_N[row_R]
        there_R = self.token_N[atom["at"]][row_R]
        return self.tokens_of(atom)[there_R]

    def rows_where(self, rule: Rule, fold: int) -> Rows:
        """All rows of a fold at which the rule holds, ascending."""
        found = [self.rows_of_term(term["all"], fold) for term in rule["any"]]
        return np.unique(np.concatenate([np.empty(0, np.int64), *found]))

    def rows_of_term(self, atoms: list[Atom], fold: int) -> Rows:
        """All rows of a fold at which all ``atoms`` hold: those of the rarest atom, sifted by the others."""
        best, row_R = None, self.rows[fold]
        for atom in atoms:
            if "at" in atom:
                mask_V = self.tokens_of(atom)
                n = int(self.counts(fold, atom["at"])[mask_V].sum())
                if n < len(row_R) // 4 and (best is None or n < best[0]):
                    best = n, atom, mask_V
        if best:
            row_R = self._rows_of_tokens(fold, best[1]["at"], np.flatnonzero(best[2]))
        for atom in atoms:
            if best is None or atom is not best[1]:
                row_R = row_R[self.holds(atom, row_R)]
        return row_R

    def counts(self, fold: int, offset: int) -> NDArray[np.int64]:
        """[V + 1]: rows of the fold with each token at the offset."""
        return np.diff(self._index(fold, offset)[1])

    def _index(self, fold: int, offset: int) -> tuple[Rows, NDArray[np.int64]]:
        """Rows of the fold by token at the offset, and where each token's rows start; made once."""
        if (fold, offset) not in self._indices:
            token_R = self.token_N[offset][self.rows[fold]]
            order = np.argsort(token_R, kind="stable")
            starts = np.searchsorted(token_R[order], np.arange(len(self.vocab) + 2))
            self._indices[fold, offset] = self.rows[fold][order], starts
        return self._indices[fold, offset]

    def _rows_of_tokens(self, fold: int, offset: int, tokens: NDArray[np.integer]) -> Rows:
        row_R, starts = self._index(fold, offset)
        return row_R[ranges(starts[tokens], starts[tokens + 1])]


def ranges(low: NDArray[np.int64], high: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers of all ranges low to high - 1, one after the other."""
    length = high - low
    ends = np.cumsum(length)
    joined: NDArray[np.int64] = np.arange(length.sum()) + np.repeat(low - (ends - length), length)
    return joined


def _rows_of_the_cache(
    store: FeatureStore, tokens_X: Any, pos_X: Any, last_X: Any, counts_V: Any
) -> NDArray[np.bool_]:
    """Which tokens of the contexts were encoded: caches leave out the first or last one, or neither.

    The counts of tokens in the store determine which of these it was.
    """
    n_tokens = store.info()["n_tokens"]
    for first, last in ((1, 0), (0, 0), (1, 1), (0, 1)):
        keep_X: NDArray[np.bool_] = (pos_X >= first) & (last_X >= last)
        if keep_X.sum() == n_tokens and np.array_equal(
            np.bincount(tokens_X[keep_X], minlength=len(counts_V)), counts_V
        ):
            return keep_X
    raise UserError(
        f"which tokens of its contexts the store {store.path} was made from cannot be told from it, so rules "
        "cannot be scored; index a cache that saebench harvest made"
    )


def _repeated(tokens_X: NDArray[np.int32], ctx_X: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[X]: whether the same token stands earlier in the same context."""
    key_X = ctx_X * (int(tokens_X.max(initial=0)) + 1) + tokens_X
    order = np.argsort(key_X, kind="stable")
    again_X = np.zeros(len(key_X), dtype=bool)
    again_X[order[1:]] = key_X[order][1:] == key_X[order][:-1]
    return again_X


def _numbered(values: Iterable[str | None]) -> tuple[NDArray[np.int64], list[str]]:
    known: dict[str, int] = {"": 0}
    numbers = [known.setdefault(value, len(known)) if value else 0 for value in values]
    return np.array([*numbers, 0], dtype=np.int64), list(known)
