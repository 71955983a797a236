"""Sorted runs: the codes of a cache on disk, written in the order of tokens, read in the order of latents.

Encoding goes token by token, a store latent by latent. Codes are gathered until a few million are there,
sorted by latent and written as one Arrow file. Reading takes the slice of a range of latents from every run.

Shapes: S stored activations, M = d_sae latents.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saebench.files import sentence_for_os_errors

RUN_SIZE = 4_000_000
BYTES_PER_ENTRY = 12


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

    @property
    def counts_M(self) -> NDArray[np.int64]:
        return np.bincount(self.latent_S, minlength=self.n_latents)


class Runs:
    """Runs in a directory; ``counts_M`` is the number of activations of each latent."""

    def __init__(self, directory: Path, d_sae: int) -> None:
        directory.mkdir()
        self.directory = directory
        self.counts_M = np.zeros(d_sae, dtype=np.int64)
        self._paths: list[Path] = []
        self._waiting: list[tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.float32]]] = []
        self._n_waiting = 0

    @property
    def n_activations(self) -> int:
        return int(self.counts_M.sum())

    def add(
        self, latent_S: NDArray[np.integer], row_S: NDArray[np.integer], value_S: NDArray[np.floating]
    ) -> None:
        """Append the codes of rows that follow those of earlier calls; all codes of a row in one call."""
        batch = latent_S.astype(np.uint32), row_S.astype(np.uint32), value_S.astype(np.float32)
        self._waiting.append(batch)
        self._n_waiting += len(value_S)
        if self._n_waiting >= RUN_SIZE:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting as one more run."""
        if not self._n_waiting:
            return
        latent_S, row_S, value_S = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._n_waiting = [], 0
        order = _stable_order(latent_S, len(self.counts_M))
        latent_S, row_S, value_S = _merge_repeats(latent_S[order], row_S[order], value_S[order])
        self.counts_M += np.bincount(latent_S, minlength=len(self.counts_M))
        path = self.directory / f"run-{len(self._paths):05d}.arrow"
        _write(path, latent_S, row_S, value_S)
        self._paths.append(path)

    def groups(self, size: int) -> Iterator[Activations]:
        """All latents in order, in groups of at most ``size`` activations (or of one latent)."""
        first, d_sae = 0, len(self.counts_M)
        total = np.concatenate([[0], self.counts_M.cumsum()])
        while first < d_sae:
            stop = int(np.searchsorted(total, total[first] + size, side="right")) - 1
            stop = min(max(stop, first + 1), d_sae, first + size)
            yield self.read(first, stop)
            first = stop

    def read(self, first: int, stop: int) -> Activations:
        """The activations of latents first to stop - 1."""
        parts = []
        for path in self._paths:
            latent_S, row_S, value_S = _open(path)
            low, high = np.searchsorted(latent_S, np.array([first, stop], dtype=np.uint32))
            parts.append((latent_S[low:high] - np.uint32(first), row_S[low:high], value_S[low:high]))
        if not parts:
            parts = [(np.empty(0, np.uint32), np.empty(0, np.uint32), np.empty(0, np.float32))]
        latent_S, row_S, value_S = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        order = _stable_order(latent_S, stop - first)
        return Activations(
            first,
            stop - first,
            latent_S[order].astype(np.int64),
            row_S[order].astype(np.int64),
            value_S[order],
        )


def _stable_order(latent_S: NDArray[np.uint32], n_latents: int) -> NDArray[np.intp]:
    """Rows ascend already, so a stable sort by latent sorts by both; numpy's is linear for 16-bit keys."""
    keys = latent_S.astype(np.uint16) if n_latents <= 1 << 16 else latent_S
    return np.argsort(keys, kind="stable")


def _merge_repeats(
    latent_S: NDArray[np.uint32], row_S: NDArray[np.uint32], value_S: NDArray[np.float32]
) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.float32]]:
    """Add up what one latent has several times in one row, as SparseCodes.to_dense does."""
    repeated = (latent_S[1:] == latent_S[:-1]) & (row_S[1:] == row_S[:-1])
    if not repeated.any():
        return latent_S, row_S, value_S
    starts = np.flatnonzero(np.concatenate([[True], ~repeated]))
    summed = np.add.reduceat(value_S, starts)
    real = summed != 0
    return latent_S[starts][real], row_S[starts][real], summed[real]


def _write(
    path: Path, latent_S: NDArray[np.uint32], row_S: NDArray[np.uint32], value_S: NDArray[np.float32]
) -> None:
    import pyarrow

    batch = pyarrow.record_batch({"latent": latent_S, "row": row_S, "value": value_S})
    with sentence_for_os_errors(path), open(path, "wb") as file:
        with pyarrow.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())


def _open(path: Path) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.float32]]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        batch = pyarrow.ipc.open_file(file).get_batch(0)
    latent_S, row_S, value_S = (batch.column(name).to_numpy() for name in ("latent", "row", "value"))
    return latent_S, row_S, value_S
