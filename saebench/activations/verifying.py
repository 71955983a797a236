"""Verification of a cache's rows: blocks of a column are compared with their checksums before they are used.

A manifest has an XXH3 for each block of 128 KiB of a shard's data; one of saebench 0.1 has only the SHA-256
of each shard, and there a block is a whole shard. Each block is verified once per process, by several
threads. XXH3 reads 10 GB/s on one core, five times as much as CRC-32.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from xxhash import xxh3_64_hexdigest

from saebench.activations.manifest import CacheColumn, column_folder
from saebench.activations.mapping import map_column, populate
from saebench.activations.shards import BLOCK_BYTES, SUM_DIGITS, row_bytes, shard_path
from saebench.core.errors import UserError
from saebench.core.files import sha256_file

Range = tuple[int, int]
"""Rows [first, end)."""
_BLOCKS_PER_TASK = 64
_verified: dict[object, NDArray[np.bool_]] = {}
"""Of each column that this process has opened, by its files: which blocks are verified."""
_opening = threading.Lock()


class VerifiedColumn:
    """A column of a cache, mapped from disk. ``column[rows]`` verifies the blocks of the rows and then reads
    them.

    Attributes:
        tensor: the mapped rows, [n, ...]; `require` verifies the ones to be used.
    """

    def __init__(self, cache: Path, name: str, column: CacheColumn) -> None:
        self.tensor = map_column(cache, name, column)
        self.row_bytes = row_bytes(column.type.dtype, column.type.row_shape)
        self._shards = column.shards
        self._paths = [shard_path(cache / column_folder(name), i) for i in range(len(column.shards))]
        self._data = self.tensor.reshape(-1).view(torch.uint8)
        self._bytes = self._data.numpy()
        sizes = [shard.rows * self.row_bytes for shard in column.shards]
        self._shard_bytes = max(sizes, default=1)
        self._has_blocks = all(shard.blocks is not None for shard in column.shards)
        self._block_bytes = BLOCK_BYTES if self._has_blocks else max(self._shard_bytes, 1)
        self._per_shard = max(1, -(-self._shard_bytes // self._block_bytes))
        """Blocks of a full shard."""
        n_blocks = sum(-(-size // self._block_bytes) for size in sizes)
        self._lock = threading.Lock()
        with _opening:
            self._done = _verified.setdefault(self._files(), np.zeros(n_blocks, dtype=bool))
        self._all_done = bool(self._done.all())

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def width(self) -> int:
        """Values of a row."""
        return self.tensor.shape[1]

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """These rows, verified; a slice is a view of the mapped memory."""
        self.require(rows)
        return self.tensor[rows]

    def all(self) -> Tensor:
        """All rows, verified."""
        return self[:]

    def require(self, rows: Tensor | slice) -> None:
        """Verify the blocks of ``rows`` (int64 [N] row numbers, or a slice) that are not verified yet.

        Raises:
            UserError: a block does not match its checksum; the sentence names the file.
        """
        if self._all_done:
            return
        if isinstance(rows, slice):
            first, end, _ = rows.indices(len(self.tensor))
            self.require_ranges([(first, end)] if first < end else [])
            return
        row_N = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        first_N = row_N.numpy() * np.int64(self.row_bytes)
        a_N, b_N = self._block_of(first_N), self._block_of(first_N + self.row_bytes - 1)
        if not (self._done[a_N].all() and self._done[b_N].all() and (b_N - a_N <= 1).all()):
            self._verify(a_N, b_N)

    def require_ranges(self, ranges: Sequence[Range]) -> None:
        """As `require`, of ranges of rows; blocks are read from the disk in order."""
        if self._all_done or not ranges:
            return
        bounds_R2 = np.array(ranges, dtype=np.int64) * self.row_bytes
        self._verify(self._block_of(bounds_R2[:, 0]), self._block_of(bounds_R2[:, 1] - 1))

    def _block_of(self, byte_N: NDArray[np.int64]) -> NDArray[np.int64]:
        shard_N, within_N = np.divmod(byte_N, self._shard_bytes)
        block_N: NDArray[np.int64] = shard_N * self._per_shard + within_N // self._block_bytes
        return block_N

    def _verify(self, first_N: NDArray[np.int64], last_N: NDArray[np.int64]) -> None:
        """Verify the blocks ``first_N`` to ``last_N``, both included."""
        if not len(self._done):
            return
        steps = np.zeros(len(self._done) + 1, dtype=np.int64)
        np.add.at(steps, first_N, 1)
        np.add.at(steps, last_N + 1, -1)
        with self._lock:
            todo = np.flatnonzero((steps.cumsum()[:-1] > 0) & ~self._done)
            tasks = np.split(todo, range(_BLOCKS_PER_TASK, len(todo), _BLOCKS_PER_TASK))
            if len(tasks) == 1:
                self._check(tasks[0])
            else:
                with contextlib.closing(_Threads()) as threads:
                    threads.run(self._check, tasks)
            self._all_done = bool(self._done.all())

    def _check(self, blocks: NDArray[np.int64]) -> None:
        if self._has_blocks:
            bounds = [self._bytes_of(block) for block in blocks.tolist()]
            for start, end in _joined(bounds):
                populate(self._data[start:end])
        else:
            bounds = [(0, 0)] * len(blocks)
        for block, (start, end) in zip(blocks.tolist(), bounds, strict=True):
            if self._done[block]:  # with its shard, meanwhile
                continue
            shard, within = divmod(block, self._per_shard)
            if self._has_blocks:
                digits = slice(SUM_DIGITS * within, SUM_DIGITS * (within + 1))
                if xxh3_64_hexdigest(self._bytes[start:end].data) == str(self._shards[shard].blocks)[digits]:
                    self._done[block] = True
                    continue
            # Also if the manifest's list of blocks is wrong.
            check_sha256(self._paths[shard], self._shards[shard].sha256)
            self._done[shard * self._per_shard : (shard + 1) * self._per_shard] = True

    def _bytes_of(self, block: int) -> Range:
        """The bytes [start, end) of a block in the column's data."""
        shard, within = divmod(block, self._per_shard)
        left = self._shards[shard].rows * self.row_bytes - within * self._block_bytes
        start = shard * self._shard_bytes + within * self._block_bytes
        return start, start + min(self._block_bytes, left)

    def _files(self) -> object:
        """The identity of the column's files: a file that is written again is verified again."""
        states = [path.stat() for path in self._paths]
        folder = self._paths[0].parent.resolve() if self._paths else None
        stamps = tuple((state.st_ino, state.st_mtime_ns, state.st_size) for state in states)
        return folder, stamps, tuple(shard.sha256 for shard in self._shards)


def _joined(ranges: Sequence[Range]) -> Iterator[Range]:
    """Ascending ranges, with those that touch made one."""
    first = last = ranges[0][0] if ranges else 0
    for start, end in ranges:
        if start != last:
            yield first, last
            first = start
        last = end
    if last > first:
        yield first, last


class _Threads:
    def __init__(self) -> None:
        workers = min(8, os.cpu_count() or 1)
        self._executor = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="verify")

    def run(self, check: Callable[[NDArray[np.int64]], None], tasks: Sequence[NDArray[np.int64]]) -> None:
        for done in [self._executor.submit(check, task) for task in tasks]:
            done.result()

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


def check_sha256(path: Path, expected: str) -> None:
    """Raise a UserError unless a file of a cache has this checksum."""
    seen = sha256_file(path)
    if seen != expected:
        raise UserError(
            f"{path} is damaged: its SHA-256 is {seen[:12]}... but the manifest says {expected[:12]}...; "
            "restore it, or delete the cache and make it again"
        )
