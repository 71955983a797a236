"""The rows of a cache as numpy arrays: which token, context, position and document each one is.

Shapes: N rows (tokens that the cache keeps), C contexts, T positions, V tokens of the vocabulary.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from saebench.errors import UserError

if TYPE_CHECKING:
    from saebench.activations.cache import ActivationCache

    Ints = NDArray[np.integer]

CHUNK = 1 << 22
MOST_ROWS = 1 << 32


class Corpus:
    """Where each row of a cache comes from. Arrays are views of the mapped cache.

    An imported cache has no text: ``has_text`` is False, every row is its own context at position 0, and
    only ``n_rows`` and ``place`` may be used.

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
        if not self.has_text:
            return
        arrays = [column.numpy() for column in columns if column is not None]
        self.ctx, self.pos, self.doc, self.tokens, self.context_tokens, self.context_len = arrays
        assert vocab is not None
        self.vocab = vocab
        self.labels = cache.doc_labels()
        self._check(cache)

    def place(self, row_S: Ints) -> NDArray[np.int64]:
        """One increasing number for (context, position) of each row."""
        if not self.has_text:
            return row_S.astype(np.int64)
        return self.ctx[row_S].astype(np.int64) * self.ctx_len + self.pos[row_S]

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
        digest = hashlib.sha256(b"text 1")
        for column in (self.context_len, self.context_tokens, self.ctx, self.pos, self.doc):
            digest.update(f"|{column.shape}|".encode())
            for rows in chunks(len(column), CHUNK // max(1, column[:1].size)):
                digest.update(np.ascontiguousarray(column[rows], dtype=np.int32).tobytes())
        for words in (self.vocab, [label.encode("utf-8", "surrogatepass") for label in self.labels or []]):
            digest.update(b"|%d|" % len(words))
            for word in words:
                digest.update(b"%d:" % len(word) + word)
        return digest.hexdigest()

    def _check(self, cache: ActivationCache) -> None:
        last = -1
        for rows in chunks(self.n_rows):
            if not 0 <= self.tokens[rows].min() <= self.tokens[rows].max() < len(self.vocab):
                raise UserError(
                    f"the cache {cache.path} has a token {self.tokens[rows].max()} outside its vocabulary of "
                    f"{len(self.vocab)}; run saebench cache verify on it"
                )
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
