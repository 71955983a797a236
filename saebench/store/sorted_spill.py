"""SortedSpill: codes on disk in sorted runs, written in the order of tokens, read in the order of latents.

Encoding goes token by token, a store latent by latent. Codes are gathered until a few million are there,
sorted by latent and written as one Parquet file, with a row group for each block of latents. Reading takes
the blocks of a range of latents from every run.

Shapes: S stored activations, M = d_sae latents.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from saebench.core.files import make_directory, sentence_for_os_errors, sync_directory

if TYPE_CHECKING:
    import pyarrow.parquet

RUN_SIZE = 4_000_000
BYTES_PER_ENTRY = 12
BLOCKS = 64
"""Blocks of latents in a run; what is read for a group of latents is whole blocks."""


@dataclass(frozen=True)
class Activations:
    """All activations of the latents ``first`` to ``first + n_latents - 1``, sorted by latent and row.

    ``latent_S`` int64 counts from 0 at ``first``; ``row_S`` int64; ``value_S`` float32, never 0.
    """

    first: int
    n_latents: int
    latent_S: NDArray[np.int64]
    row_S: NDArray[np.int64]
    value_S: NDArray[np.float32]

    @functools.cached_property
    def counts_M(self) -> NDArray[np.int64]:
        """Activations of each latent."""
        return np.bincount(self.latent_S, minlength=self.n_latents)

    @functools.cached_property
    def starts_M(self) -> NDArray[np.int64]:
        """Where each latent's activations begin."""
        return np.cumsum(self.counts_M) - self.counts_M

    @functools.cached_property
    def order_S(self) -> NDArray[np.intp]:
        """Indices by latent, ascending activation and row; one 64-bit key sorts much faster than lexsort."""
        key_S = self.latent_S.astype(np.uint64) << np.uint64(32) | ordered_bits(self.value_S)
        return np.argsort(key_S, kind="stable")

    @functools.cached_property
    def ascending_S(self) -> NDArray[np.float32]:
        """The activations in the order of ``order_S``."""
        return self.value_S[self.order_S]


def ordered_bits(value_S: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Integers in the order of the floats."""
    bits = np.ascontiguousarray(value_S, dtype=np.float32).view(np.uint32)
    return bits ^ np.where(bits >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))


class SortedSpill:
    """SortedSpill in a directory; ``counts_M`` is the number of activations of each latent.

    Args:
        names: existing files of the directory to use, in order.
    """

    def __init__(self, directory: Path, d_sae: int, names: Sequence[str] = ()) -> None:
        make_directory(directory)
        self.directory = directory
        self.counts_M = np.zeros(d_sae, dtype=np.int64)
        self.n_waiting = 0
        self._waiting: list[tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.float32]]] = []
        self._files: list[pyarrow.parquet.ParquetFile] = []
        for name in names:
            self._take(directory / name)

    @property
    def n_activations(self) -> int:
        return int(self.counts_M.sum())

    def add(
        self, latent_S: NDArray[np.integer], row_S: NDArray[np.integer], value_S: NDArray[np.floating]
    ) -> None:
        """Append the codes of rows that follow those of earlier calls; all codes of a row in one call."""
        self._waiting.append(
            (latent_S.astype(np.uint32), row_S.astype(np.uint32), value_S.astype(np.float32))
        )
        self.n_waiting += len(value_S)

    def flush(self) -> Path | None:
        """Write the waiting entries as one more run, sync it to disk, and return its path."""
        if not self.n_waiting:
            return None
        latent_S, row_S, value_S = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self.n_waiting = [], 0
        order = _stable_order(latent_S, len(self.counts_M))
        latent_S, row_S, value_S = _merge_repeats(latent_S[order], row_S[order], value_S[order])
        path = self.directory / f"run-{len(self._files):05d}.parquet"
        _write(path, self._block, latent_S, row_S, value_S)
        self._take(path)
        return path

    def groups(self, size: int, latents: int) -> Iterator[Activations]:
        """All latents in order, in groups of at most ``size`` activations (or of one latent); see ranges."""
        for first, stop in ranges(self.counts_M, size, latents):
            yield self.read(first, stop)

    def read(self, first: int, stop: int) -> Activations:
        """The activations of latents first to stop - 1."""
        blocks = list(range(first // self._block, -(-stop // self._block)))
        parts = [(np.empty(0, np.uint32), np.empty(0, np.uint32), np.empty(0, np.float32))]
        for file in self._files:
            latent_S, row_S, value_S = _columns(file, blocks)
            low, high = np.searchsorted(latent_S, np.array([first, stop], dtype=np.uint32))
            parts.append((latent_S[low:high] - np.uint32(first), row_S[low:high], value_S[low:high]))
        latent_S, row_S, value_S = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        order = _stable_order(latent_S, stop - first)
        return Activations(
            first,
            stop - first,
            latent_S[order].astype(np.int64),
            row_S[order].astype(np.int64),
            value_S[order],
        )

    def by_row(self) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.float32]]]:
        """``(latent, row, value)`` of run after run, by row and latent."""
        for file in self._files:
            latent_S, row_S, value_S = _columns(file, list(range(file.num_row_groups)))
            order = np.argsort(row_S, kind="stable")
            yield latent_S[order], row_S[order], value_S[order]

    @property
    def _block(self) -> int:
        """Latents in a block."""
        return -(-len(self.counts_M) // BLOCKS)

    def _take(self, path: Path) -> None:
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        for group in range(file.num_row_groups):
            latent_S = file.read_row_group(group, columns=["latent"]).column("latent").to_numpy()
            if len(latent_S):
                low, high = int(latent_S[0]), int(latent_S[-1]) + 1
                self.counts_M[low:high] += np.bincount(latent_S - latent_S[0], minlength=high - low)
        self._files.append(file)


def ranges(counts_M: NDArray[np.int64], size: int, latents: int) -> Iterator[tuple[int, int]]:
    """``(first, stop)`` of groups: at most ``latents`` latents, and unless one has more ``size`` entries."""
    first, d_sae = 0, len(counts_M)
    total = np.concatenate([[0], counts_M.cumsum()])
    while first < d_sae:
        stop = int(np.searchsorted(total, total[first] + size, side="right")) - 1
        stop = min(max(stop, first + 1), d_sae, first + min(size, latents))
        yield first, stop
        first = stop


def _stable_order(latent_S: NDArray[np.uint32], n_latents: int) -> NDArray[np.intp]:
    """Rows ascend already, so a stable sort by latent sorts by both; numpy's is linear for 16-bit keys."""
    keys = latent_S.astype(np.uint16) if n_latents <= 1 << 16 else latent_S
    return np.argsort(keys, kind="stable")


def _merge_repeats(
    latent_S: NDArray[np.uint32], row_S: NDArray[np.uint32], value_S: NDArray[np.float32]
) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.float32]]:
    """Sum repeated entries of a latent in a row, as SparseCodes.to_dense does."""
    repeated = (latent_S[1:] == latent_S[:-1]) & (row_S[1:] == row_S[:-1])
    if not repeated.any():
        return latent_S, row_S, value_S
    starts = np.flatnonzero(np.concatenate([[True], ~repeated]))
    summed = np.add.reduceat(value_S, starts)
    real = summed != 0
    return latent_S[starts][real], row_S[starts][real], summed[real]


def _write(
    path: Path,
    block: int,
    latent_S: NDArray[np.uint32],
    row_S: NDArray[np.uint32],
    value_S: NDArray[np.float32],
) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"latent": latent_S, "row": row_S, "value": value_S})
    n_blocks = int(latent_S[-1]) // block + 1 if len(latent_S) else 0
    cuts = np.searchsorted(latent_S, (np.arange(n_blocks + 1) * block).astype(np.uint32))
    with sentence_for_os_errors(path), open(path, "wb") as file:
        with pyarrow.parquet.ParquetWriter(
            file, table.schema, compression="none", use_dictionary=["latent"], write_statistics=False
        ) as writer:
            for low, high in itertools.pairwise(cuts):
                writer.write_table(table.slice(low, high - low), row_group_size=max(1, high - low))
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)


def _columns(file: Any, blocks: list[int]) -> tuple[Any, Any, Any]:
    """latent, row and value of the blocks that a run has; the last ones may be missing."""
    table = file.read_row_groups([block for block in blocks if block < file.num_row_groups])
    latent_S, row_S, value_S = (table.column(name).to_numpy() for name in ("latent", "row", "value"))
    return latent_S, row_S, value_S
