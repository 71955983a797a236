"""Packing: documents are concatenated, cut into contexts of equal length, and grouped into batches.

Held-out documents have contexts of their own.

Shapes: B contexts, T = ctx positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from saebench.sources.text import Document

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Context:
    """One input of the model: ``tokens`` [length], and ``docs`` [length], the document of each token."""

    tokens: Int32
    docs: Int32
    held_out: bool

    def __len__(self) -> int:
        return len(self.tokens)

    def cut(self, length: int) -> Context:
        return Context(self.tokens[:length], self.docs[:length], self.held_out)


@dataclass(frozen=True)
class ContextBatch:
    """Contexts for one forward pass, and the positions that become rows of the cache.

    ``tokens_BT`` is int32, and 0 after the end of each context; ``keep_BT`` is bool.
    """

    contexts: Sequence[Context]
    tokens_BT: Int32
    keep_BT: npt.NDArray[np.bool_]

    n_excluded: int = 0
    """Positions that are not rows because of their tokens, also of contexts left out before this batch."""

    @property
    def n_rows(self) -> int:
        return int(self.keep_BT.sum())


def pack(
    documents: Iterable[Document],
    encode: Callable[[Document], Sequence[int]],
    *,
    ctx: int,
    bos: int | None = None,
) -> Iterator[Context]:
    """Contexts of ``ctx`` tokens, in the order in which they are filled.

    ``encode`` gives the tokens of a document, with the separator that belongs to it. Held-out documents and
    the others are two separate streams, so no context mixes them; the rest of each stream is a shorter
    context.
    With ``bos`` every context begins with that token, which belongs to the document of the token after it.
    Documents are numbered from 0 in the order of reading.
    """
    width = ctx - (bos is not None)
    streams = {False: _Stream(width, bos), True: _Stream(width, bos)}
    for number, document in enumerate(documents):
        ids = np.array(encode(document), dtype=np.int32)
        for tokens, docs in streams[document.held_out].push(ids, number):
            yield Context(tokens, docs, document.held_out)
    for held_out, stream in streams.items():
        for tokens, docs in stream.rest():
            yield Context(tokens, docs, held_out)


class _Stream:
    def __init__(self, width: int, bos: int | None) -> None:
        self._width, self._bos = width, bos
        self._tokens = np.empty(0, np.int32)
        self._docs = np.empty(0, np.int32)

    def push(self, ids: Int32, document: int) -> Iterator[tuple[Int32, Int32]]:
        tokens = np.concatenate([self._tokens, ids])
        docs = np.concatenate([self._docs, np.full(len(ids), document, np.int32)])
        whole = len(tokens) // self._width * self._width
        self._tokens, self._docs = tokens[whole:].copy(), docs[whole:].copy()
        for start in range(0, whole, self._width):
            yield self._context(tokens[start : start + self._width], docs[start : start + self._width])

    def rest(self) -> Iterator[tuple[Int32, Int32]]:
        if len(self._tokens):
            yield self._context(self._tokens, self._docs)

    def _context(self, tokens: Int32, docs: Int32) -> tuple[Int32, Int32]:
        if self._bos is None:
            return tokens, docs
        return np.insert(tokens, 0, self._bos), np.insert(docs, 0, docs[0])


def batches(
    contexts: Iterable[Context],
    *,
    ctx: int,
    batch_size: int,
    keep_first: bool,
    keep_last: bool = True,
    max_rows: int,
    exclude: Sequence[int] = (),
) -> Iterator[ContextBatch]:
    """Group contexts into batches, until exactly ``max_rows`` rows are kept (the last context is cut).

    Without ``keep_first`` position 0 of each context is not a row; without ``keep_last`` its last position is
    not. Positions of the tokens ``exclude`` are not, either. A context without rows is left out.
    """
    first, last = int(not keep_first), int(not keep_last)
    excluded = np.array(sorted(exclude), np.int32)
    n_rows, n_excluded, gathered = 0, 0, []
    for context in contexts:
        is_row = ~np.isin(context.tokens[first : max(first, len(context) - last)], excluded)
        place = first + np.flatnonzero(is_row)[: max_rows - n_rows]
        if len(place) == max_rows - n_rows:
            context = context.cut(int(place[-1]) + 1 + last)
            is_row = is_row[: len(context) - last - first]
        n_excluded += int((~is_row).sum())
        if len(place) == 0:
            continue
        gathered.append(context)
        n_rows += len(place)
        if len(gathered) == batch_size or n_rows == max_rows:
            yield _batch(gathered, ctx, first, last, excluded, n_excluded)
            n_excluded, gathered = 0, []
        if n_rows == max_rows:
            return
    if gathered:
        yield _batch(gathered, ctx, first, last, excluded, n_excluded)


def _batch(
    contexts: list[Context], ctx: int, first: int, last: int, excluded: Int32, n_excluded: int
) -> ContextBatch:
    tokens_BT = np.zeros((len(contexts), ctx), np.int32)
    for row, context in zip(tokens_BT, contexts, strict=True):
        row[: len(context)] = context.tokens
    lengths = np.array([len(context) for context in contexts])
    positions = np.arange(ctx)
    keep_BT = (positions >= first) & (positions < lengths[:, None] - last)
    keep_BT &= ~np.isin(tokens_BT, excluded)
    return ContextBatch(contexts, tokens_BT, keep_BT, n_excluded)
