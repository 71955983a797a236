"""The rows of a cache as numpy arrays: the token, context, position and document of each.

A context is a unit of the cache's modality: of a text, the tokens that the model read at once.

Shapes: N rows (tokens that the cache keeps), C contexts, T positions, V tokens of the vocabulary.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from saebench.core.errors import UserError
from saebench.sources.modality import TEXT
from saebench.store.schema import POSITION_BUCKETS

if TYPE_CHECKING:
    from saebench.activations.cache import ActivationCache

    Ints = NDArray[np.integer]

CHUNK = 1 << 22
MOST_ROWS = 1 << 32
MOST_OCCURRENCES = 1 << 24
"""Rows in the index of token occurrences; of a longer text, at most this many, evenly spaced."""


class Corpus:
    """The token, context, position and document of each row of a cache, as views of the mapped cache.

    A cache of other units has ``has_text`` False: it has neither tokens nor documents. In a cache of plain
    vectors ``has_units`` is False too: every row is its own context at position 0, and only ``n_rows``,
    ``place``, ``ctx_of`` and ``pos_of`` may be used.

    Raises:
        UserError: the cache has more rows than a store can number, a token outside its vocabulary, or rows
            that are not in the order of their contexts.
    """

    ctx: Ints
    pos: Ints
    doc: Ints
    tokens: Ints
    context_tokens: Ints
    context_len: Ints
    vocab: list[bytes]
    labels: list[str] | None
    unit_columns: dict[str, NDArray[np.float64]]
    """The user's columns with one value per unit."""
    row_columns: dict[str, NDArray[np.float64]]
    """The user's columns with one value per row."""

    def __init__(self, cache: ActivationCache) -> None:
        self.n_rows = cache.n_rows
        if not 0 < self.n_rows < MOST_ROWS:
            raise UserError(
                f"the cache {cache.path} has {self.n_rows:,} rows; a store takes 1 to {MOST_ROWS - 1:,}"
            )
        vocab = cache.vocab()
        columns = (cache.ctx, cache.pos, cache.doc, cache.tokens, cache.context_tokens, cache.context_len)
        self.has_text = vocab is not None and all(column is not None for column in columns)
        self.n_contexts, self.ctx_len = (
            (cache.n_contexts, int(cache.ctx_len or 0)) if self.has_text else (0, 0)
        )
        self.modality = TEXT.name if self.has_text else cache.modality.name
        self.has_units = self.has_text or cache.unit is not None
        if not self.has_text:
            self._read_units(cache)
            return
        arrays = [column.numpy() for column in columns if column is not None]
        self.ctx, self.pos, self.doc, self.tokens, self.context_tokens, self.context_len = arrays
        assert vocab is not None
        self.vocab = vocab
        self.labels = cache.doc_labels()
        self._check(cache)

    def _read_units(self, cache: ActivationCache) -> None:
        if cache.unit is None or cache.pos is None or cache.unit_len is None:
            return
        self.ctx, self.pos, self.context_len = (
            column.numpy() for column in (cache.unit, cache.pos, cache.unit_len)
        )
        self.n_contexts, self.ctx_len = cache.n_contexts, int(self.context_len.max())
        self.unit_columns, self.row_columns = (
            {name: column.numpy().astype(np.float64) for name, column in columns.items()}
            for columns in (cache.unit_columns(), cache.row_columns())
        )
        self._check_order(cache)

    def ctx_of(self, row_S: Ints) -> Ints:
        """[S]: the context of each row."""
        return self.ctx[row_S] if self.has_units else row_S

    def pos_of(self, row_S: Ints) -> Ints:
        """[S]: the position of each row in its context."""
        return self.pos[row_S] if self.has_units else np.zeros_like(row_S)

    def place(self, row_S: Ints) -> NDArray[np.int64]:
        """One increasing number for (context, position) of each row."""
        if not self.has_units:
            return row_S.astype(np.int64)
        return self.ctx[row_S].astype(np.int64) * self.ctx_len + self.pos[row_S]

    def tokens_at(self, row_S: Ints, offset: int) -> NDArray[np.int64]:
        """[S]: the token ``offset`` places after each row in its context; -1 beyond the context's ends."""
        if offset == 0:
            return self.tokens[row_S].astype(np.int64)
        ctx_S, pos_S = self.ctx[row_S], self.pos[row_S] + offset
        inside_S = (pos_S >= 0) & (pos_S < self.context_len[ctx_S])
        tokens_S = self.context_tokens[ctx_S, np.clip(pos_S, 0, self.ctx_len - 1)]
        return np.where(inside_S, tokens_S, -1).astype(np.int64)

    def is_first(self, row_S: Ints) -> NDArray[np.bool_]:
        """[S]: whether each row is the first that the cache keeps of its context."""
        first_S: NDArray[np.bool_] = self.ctx[row_S] != self.ctx[np.maximum(row_S - 1, 0)]
        first_S |= row_S == 0
        return first_S

    @property
    def n_buckets(self) -> int:
        """Parts into which a context is cut for the profile of positions."""
        return min(POSITION_BUCKETS, self.ctx_len)

    def bucket(self, row_S: Ints) -> NDArray[np.int64]:
        """[S]: the part of the context that each row is in."""
        return self.pos[row_S].astype(np.int64) * self.n_buckets // self.ctx_len

    @functools.cached_property
    def bucket_counts(self) -> NDArray[np.int64]:
        """Rows in each part of the context."""
        counts = np.zeros(self.n_buckets, dtype=np.int64)
        for rows in chunks(self.n_rows):
            counts += np.bincount(self.bucket(np.arange(rows.start, rows.stop)), minlength=len(counts))
        return counts

    @functools.cached_property
    def docs_ascend(self) -> bool:
        """Whether rows are in the order of their documents."""
        return all(
            bool((np.diff(self.doc[max(rows.start - 1, 0) : rows.stop]) >= 0).all())
            for rows in chunks(self.n_rows)
        )

    @functools.cached_property
    def label_names(self) -> list[str]:
        """The different labels of documents, in the order in which they appear."""
        return list(dict.fromkeys(label for label in self.labels or [] if label))

    @functools.cached_property
    def label_of_doc(self) -> NDArray[np.int64]:
        """For each document the place of its label in ``label_names``; -1 without one."""
        places = {label: place for place, label in enumerate(self.label_names)}
        labels = (self.labels or [])[: self.n_documents]
        labels += [""] * (self.n_documents - len(labels))
        return np.array([places.get(label, -1) for label in labels], dtype=np.int64)

    @functools.cached_property
    def label_counts(self) -> NDArray[np.int64]:
        """Rows with each label."""
        counts = np.zeros(len(self.label_names) + 1, dtype=np.int64)
        for rows in chunks(self.n_rows):
            counts += np.bincount(self.label_of_doc[self.doc[rows]] + 1, minlength=len(counts))
        return counts[1:]

    @functools.cached_property
    def occurrences(self) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """``(rows, ends)``: rows in the order of their tokens; those of token t end at ends[t + 1]."""
        step = -(-self.n_rows // MOST_OCCURRENCES)
        tokens = np.ascontiguousarray(self.tokens[::step])
        counts = np.bincount(tokens, minlength=len(self.vocab))
        order = np.argsort(tokens, kind="stable").astype(np.uint32) * np.uint32(step)
        return order, np.concatenate([[0], np.cumsum(counts)])

    @functools.cached_property
    def role_counts(self) -> dict[int, NDArray[np.int64]]:
        """Offset -> [V] rows that have each token at that offset."""
        counts = {0: self.token_counts}
        for offset in (-1, 1):
            found = np.zeros(len(self.vocab) + 1, dtype=np.int64)
            for rows in chunks(self.n_rows):
                tokens = self.tokens_at(np.arange(rows.start, rows.stop), offset)
                found += np.bincount(tokens + 1, minlength=len(found))
            counts[offset] = found[1:]
        return counts

    @functools.cached_property
    def token_counts(self) -> NDArray[np.int64]:
        """[V]: rows with each token."""
        counts = np.zeros(len(self.vocab), dtype=np.int64)
        for rows in chunks(self.n_rows):
            counts += np.bincount(self.tokens[rows], minlength=len(counts))
        return counts

    @functools.cached_property
    def n_documents(self) -> int:
        return max(int(self.doc[rows].max()) for rows in chunks(self.n_rows)) + 1

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of all that a text file holds: equal for caches of other hooks over the same text."""
        if not self.has_text:
            return self._hash_of_units()
        digest = hashlib.sha256(b"text 2")
        for column in (self.context_len, self.context_tokens, self.ctx, self.pos, self.doc):
            digest.update(f"|{column.shape}|".encode())
            for rows in chunks(len(column), CHUNK // max(1, column[:1].size)):
                digest.update(np.ascontiguousarray(column[rows], dtype=np.int32).tobytes())
        for words in (self.vocab, [label.encode("utf-8", "surrogatepass") for label in self.labels or []]):
            digest.update(b"|%d|" % len(words))
            for word in words:
                digest.update(b"%d:" % len(word) + word)
        return digest.hexdigest()

    def _hash_of_units(self) -> str:
        digest = hashlib.sha256(f"units 1 {self.modality}".encode())
        for column in (self.context_len, self.ctx, self.pos):
            digest.update(f"|{column.shape}|".encode() + column.astype(np.int32).tobytes())
        for kind, columns in (("unit", self.unit_columns), ("row", self.row_columns)):
            for name, values in columns.items():
                digest.update(f"|{kind} {name}|".encode() + values.tobytes())
        return digest.hexdigest()

    def _check(self, cache: ActivationCache) -> None:
        self._check_order(cache)
        for rows in chunks(self.n_rows):
            if not 0 <= self.tokens[rows].min() <= self.tokens[rows].max() < len(self.vocab):
                raise UserError(
                    f"the cache {cache.path} has a token {self.tokens[rows].max()} outside its vocabulary of "
                    f"{len(self.vocab)}; run saebench cache verify on it"
                )

    def _check_order(self, cache: ActivationCache) -> None:
        last = -1
        for rows in chunks(self.n_rows):
            place = self.ctx[rows].astype(np.int64) * self.ctx_len + self.pos[rows]
            if place[0] <= last or (np.diff(place) <= 0).any() or self.pos[rows].max() >= self.ctx_len:
                raise UserError(
                    f"the rows of the cache {cache.path} are not in the order of their contexts; "
                    "run saebench cache verify on it"
                )
            last = int(place[-1])


def chunks(n: int, size: int = CHUNK) -> Iterator[slice]:
    """Slices that cover range(n) in order."""
    size = max(1, size)
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
