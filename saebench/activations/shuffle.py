"""RowOrder: the shuffled order in which training visits rows, a function of seed and position alone.

Rows that are not held out are numbered 0..n-1 ("train index"). The order is an endless sequence, epoch after
epoch; position p of it belongs to epoch p // n. Within an epoch the shuffle has two levels:

1. Consecutive train indices form blocks (about 256 KiB of activations; more when a cache of more than
   2 TiB would have over 2^23 of them). All blocks of the cache are permuted by (seed, epoch).
2. Consecutive permuted blocks form windows (up to 2^20 rows or 1 GiB). The rows of a window are permuted by
   (seed, epoch, window).

A batch therefore mixes rows of blocks from the whole cache, while only one window is read at a time, in
pieces that are large enough for disks. The order of a cache with one window is a full permutation.
Permutations come from a hash defined in this module, so the order is the same on every machine and with
every library version. It does not depend on batch size, memory, threads or device.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from saebench.core.hashing import splitmix64

BLOCK_BYTES = 256 << 10
MOST_BLOCKS = 1 << 23  # the tables take 400 MB: memory is bounded for a cache of any size
WINDOW_BYTES = 1 << 30
WINDOW_ROWS = 1 << 20

Int64 = npt.NDArray[np.int64]

_BYTES_PER_WINDOW_ROW = 3 * 4 + 4 * 8  # three windows as uint32, and keys, buffer and result of one sort
_SCAN_ROWS = 1 << 20


def permutation(n: int, *key: int | str) -> Int64:
    """The numbers 0..n-1 in an order that depends only on n and ``key``.

    Number i gets the sort key splitmix64(h + i * 0x9E3779B97F4A7C15), where h is the first 8 bytes of the
    SHA-256 of the repr of ``key``. splitmix64 is a bijection, so no two sort keys are equal.
    """
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")
    z = np.arange(n, dtype=np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(seed)
    return np.argsort(splitmix64(z))


@dataclass(frozen=True)
class Span:
    """One window of one epoch: positions [start, stop) of the endless sequence."""

    epoch: int
    window: int
    start: int
    stop: int


class RowOrder:
    """Maps positions of the endless training sequence to row numbers of a cache.

    ``held_out`` [n] bool marks the rows to leave out; ``row_bytes`` is the size of one row of activations.
    ``block_rows`` and ``window_blocks`` override the sizes that follow from it.
    """

    def __init__(
        self,
        held_out: npt.NDArray[np.bool_],
        *,
        seed: int,
        row_bytes: int,
        block_rows: int | None = None,
        window_blocks: int | None = None,
    ) -> None:
        self.seed = seed
        self._range_starts, self._range_ends = _kept_ranges(held_out)
        self.n_rows = int(self._range_ends[-1]) if len(self._range_ends) else 0
        self.block_rows = block_rows or max(1, BLOCK_BYTES // row_bytes, -(-self.n_rows // MOST_BLOCKS))
        window_rows = min(WINDOW_ROWS, WINDOW_BYTES // row_bytes)
        self.window_blocks = window_blocks or max(1, window_rows // self.block_rows)
        self.n_blocks = -(-self.n_rows // self.block_rows)
        self.n_windows = -(-self.n_blocks // self.window_blocks)
        self._missing = self.n_blocks * self.block_rows - self.n_rows  # by which the last block is short
        self._lock, self._making = threading.Lock(), threading.Lock()
        self._blocks: dict[int, Int64] = {}
        self._windows: dict[tuple[int, int], npt.NDArray[np.uint32]] = {}

    @property
    def memory_bytes(self) -> int:
        """Upper bound of the memory of all tables of this object."""
        window_rows = min(self.n_rows, self.block_rows * self.window_blocks)
        ranges = self._range_starts.nbytes + self._range_ends.nbytes
        return ranges + 48 * self.n_blocks + _BYTES_PER_WINDOW_ROW * window_rows

    def rows(self, start: int, stop: int) -> Int64:
        """Row numbers at positions [start, stop) of the endless sequence, [stop - start]."""
        parts = []
        while start < stop:
            span = self.span_at(start)
            end = min(stop, span.stop)
            index = self._window(span)[start - span.start : end - span.start].astype(np.int64)
            parts.append(self._to_rows(self._train_index(span, index)))
            start = end
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def span_at(self, position: int) -> Span:
        """The window that holds ``position``."""
        epoch, within = divmod(position, self.n_rows)
        step = self.window_blocks * self.block_rows
        window = min((within + self._missing) // step, self.n_windows - 1)
        while within < self._window_start(epoch, window):
            window -= 1
        start, stop = self._window_start(epoch, window), self._window_start(epoch, window + 1)
        return Span(epoch, window, epoch * self.n_rows + start, epoch * self.n_rows + stop)

    def prepare(self, span: Span) -> list[tuple[int, int]]:
        """Compute the tables of a window ahead of use; returns its rows as ascending [first, end) ranges."""
        self._window(span)
        first = span.window * self.window_blocks
        blocks = np.sort(self._block_order(span.epoch)[first : first + self.window_blocks])
        ends = np.minimum((blocks + 1) * self.block_rows, self.n_rows)
        first_rows, last_rows = self._to_rows(blocks * self.block_rows), self._to_rows(ends - 1)
        return list(zip(first_rows.tolist(), (last_rows + 1).tolist(), strict=True))

    def _window_start(self, epoch: int, window: int) -> int:
        """Position within its epoch at which a window begins."""
        if window >= self.n_windows:
            return self.n_rows
        first = window * self.window_blocks
        before = self._missing and (self._block_order(epoch)[:first] == self.n_blocks - 1).any()
        return first * self.block_rows - (self._missing if before else 0)

    def _train_index(self, span: Span, index: Int64) -> Int64:
        """Train indices of the rows at ``index`` of a window (before its rows are permuted)."""
        first = span.window * self.window_blocks
        blocks = self._block_order(span.epoch)[first : first + self.window_blocks]
        if self._missing:
            short = np.flatnonzero(blocks == self.n_blocks - 1)
            if len(short):
                end = (int(short[0]) + 1) * self.block_rows - self._missing
                index = np.where(index >= end, index + self._missing, index)
        place, offset = np.divmod(index, self.block_rows)
        return blocks[place] * self.block_rows + offset

    def _to_rows(self, train_index: Int64) -> Int64:
        place = np.searchsorted(self._range_ends, train_index, side="right")
        begin = np.where(place > 0, self._range_ends[place - 1], 0)
        return self._range_starts[place] + train_index - begin

    def _block_order(self, epoch: int) -> Int64:
        with self._lock:
            known = self._blocks.get(epoch)
        if known is None:
            known = permutation(self.n_blocks, self.seed, epoch, "blocks")
            self._keep(self._blocks, epoch, known)
        return known

    def _window(self, span: Span) -> npt.NDArray[np.uint32]:
        """The permutation of the rows of a window; two windows are cached."""
        key = (span.epoch, span.window)
        known = self._known(key)
        if known is None:
            with self._making:  # one at a time: two would need twice the memory
                known = self._known(key)
                if known is None:
                    order = permutation(span.stop - span.start, self.seed, span.epoch, span.window)
                    known = order.astype(np.uint32)
                    self._keep(self._windows, key, known)
        return known

    def _known(self, key: tuple[int, int]) -> npt.NDArray[np.uint32] | None:
        with self._lock:
            return self._windows.get(key)

    def _keep(self, table: dict, key: object, value: object) -> None:  # type: ignore[type-arg]
        with self._lock:
            table[key] = value
            while len(table) > 2:
                del table[next(iter(table))]


def _kept_ranges(held_out: npt.NDArray[np.bool_]) -> tuple[Int64, Int64]:
    """Ranges of consecutive rows that are not held out: the first row of each, and the number of kept rows up
    to its end.

    ``held_out`` is scanned in pieces, so memory grows only with the number of ranges.
    """
    starts: list[Int64] = []
    lengths: list[Int64] = []
    carried = False
    for first in range(0, len(held_out), _SCAN_ROWS):
        kept = ~held_out[first : first + _SCAN_ROWS]
        edges = np.flatnonzero(np.diff(kept.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
        range_starts, range_lengths = edges[:, 0] + first, edges[:, 1] - edges[:, 0]
        if carried and len(range_starts) and range_starts[0] == first:
            lengths[-1][-1] += range_lengths[0]
            range_starts, range_lengths = range_starts[1:], range_lengths[1:]
        if len(range_starts):
            starts.append(range_starts)
            lengths.append(range_lengths)
        carried = bool(kept[-1])
    if not starts:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    return np.concatenate(starts).astype(np.int64), np.concatenate(lengths).cumsum().astype(np.int64)
