"""Loader: batches of activations for training, in shuffled order, prefetched by a thread.

Rows are gathered directly from the memory-mapped files, so the activations stay in the page cache, which the
operating system can reclaim. The order in shuffle.py reads one window of the cache at a time, and a thread
reads the next window into the page cache and verifies its checksums while the current one is used. A row of
a block that is not verified is in no batch.

Shapes: N = batch_size rows, D = d_in.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from saebench.activations.cache import ActivationCache
from saebench.activations.mapping import populate
from saebench.activations.shuffle import RowOrder, Span
from saebench.activations.verifying import VerifiedColumn
from saebench.core.errors import UserError
from saebench.core.files import human_bytes
from saebench.core.prefetch import prefetch

_BATCHES_HELD_BACK = 4  # glibc keeps freed blocks of twice the largest one, in every thread that allocates


class Rows(NamedTuple):
    """A batch: ``activations`` [N, D], and ``gradients`` and ``targets`` [N, E] of the same rows, or None."""

    activations: Tensor
    gradients: Tensor | None
    targets: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Rows:
        """``function`` of each column that is there."""
        gradients, targets = (None if c is None else function(c) for c in (self.gradients, self.targets))
        return Rows(function(self.activations), gradients, targets)


class Loader:
    """An endless sequence of batches of rows, epoch after epoch; held-out rows never appear.

    The rows are those of one hook, or of several side by side.

    Batch i holds positions [i * batch_size, (i + 1) * batch_size) of the order that `RowOrder` defines, which
    depends only on ``seed``. The last rows of an epoch share a batch with the first rows of the next epoch.
    The state of a loader is therefore one integer, the number of the next batch, and batches do not depend on
    ``prefetch``, ``memory_bytes``, threads or ``device``. Batches have the cache's dtype and are on
    ``device``. With ``targets`` each batch also has the activations of its rows at these hooks, side by side;
    with ``gradients``, the gradients of its rows at the targets, or else at ``hook``.

    ``memory_bytes`` bounds the anonymous memory of the loader: the tables of the order, ``prefetch`` + 3
    batches, and 4 more batches that the allocator may keep. The activations in the cache stay file-backed.

    Raises:
        UserError: the cache has no such hook, no gradients though ``gradients`` is True, or no row to train
            on, or ``memory_bytes`` is too small.
    """

    def __init__(
        self,
        cache: ActivationCache,
        hook: str | Sequence[str] | None = None,
        *,
        batch_size: int,
        seed: int,
        targets: Sequence[str] = (),
        gradients: bool = False,
        device: torch.device | str = "cpu",
        memory_bytes: int = 1 << 30,
        prefetch: int = 2,
        block_rows: int | None = None,
        window_blocks: int | None = None,
    ) -> None:
        named = [hook] if hook is None or isinstance(hook, str) else hook
        sites = [cache.resolve_hook(name) for name in named]
        targets = [cache.resolve_hook(name) for name in targets]
        self.hook = " and ".join([*sites, *targets])
        self.batch_size = batch_size
        self.device = torch.device(device)
        self._prefetch = prefetch
        self._read = [cache.verified(name) for name in sites]
        self._gradients = [cache.verified_gradients(name) for name in targets or sites] if gradients else []
        self._targets = [cache.verified(name) for name in targets]
        self._columns = [*self._read, *self._gradients, *self._targets]
        self._order = RowOrder(
            cache.held_out.numpy(),
            seed=seed,
            row_bytes=sum(column.row_bytes for column in self._read),
            block_rows=block_rows,
            window_blocks=window_blocks,
        )
        if self._order.n_rows == 0:
            raise UserError(
                f"all {cache.n_rows:,} rows of {cache.path} are held out, so no row is left to train on; "
                "harvest more documents"
            )
        batches = prefetch + 3 + _BATCHES_HELD_BACK
        row_bytes = sum(column.row_bytes for column in self._columns)
        needed = self._order.memory_bytes + batches * batch_size * row_bytes
        if needed > memory_bytes:
            raise UserError(
                f"reading {cache.path} in batches of {batch_size:,} rows needs {human_bytes(needed)} but "
                f"--memory is {human_bytes(memory_bytes)}; raise --memory or lower --batch-size"
            )

    @property
    def n_rows(self) -> int:
        """Rows per epoch: the rows of the cache that are not held out."""
        return self._order.n_rows

    def __len__(self) -> int:
        """The number of batches after which every row was seen at least once."""
        return -(-self.n_rows // self.batch_size)

    def rows(self, i: int) -> Tensor:
        """Row numbers of batch i, [batch_size] int64."""
        return torch.from_numpy(self._order.rows(i * self.batch_size, (i + 1) * self.batch_size))

    def batch(self, i: int) -> Rows:
        """Batch i, ``batch_size`` rows, on ``device``."""
        return self._gather(self.rows(i)).map(lambda column_ND: column_ND.to(self.device))

    def iterate(self, start: int = 0, stop: int | None = None) -> Iterator[Rows]:
        """Batches start, start + 1, ... (up to ``stop``, or endless), prefetched by two threads.

        One thread computes the row numbers of a batch, the other gathers its rows. For a GPU, batches pass
        through pinned memory and are copied on a separate stream. Exceptions in the threads are raised here;
        closing the iterator ends the threads.
        """
        with contextlib.closing(prefetch(self._produce(start, stop), self._prefetch)) as made:
            for columns, copied in made:
                if copied is not None:
                    stream = torch.cuda.current_stream(self.device)
                    stream.wait_event(copied)
                    for column_ND in columns:
                        if column_ND is not None:
                            column_ND.record_stream(stream)
                yield columns

    def _produce(self, start: int, stop: int | None) -> Iterator[tuple[Rows, torch.cuda.Event | None]]:
        """The columns of each batch on ``device``, with the event after their copy to a GPU, or None."""
        copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        numbers = itertools.count(start) if stop is None else range(start, stop)
        ordered = prefetch(((i, self.rows(i)) for i in numbers), min(1, self._prefetch))
        with (
            contextlib.closing(_Readahead(self._order, self._columns)) as readahead,
            contextlib.closing(ordered),
        ):
            for i, rows_N in ordered:
                readahead.enter(i * self.batch_size, (i + 1) * self.batch_size)
                columns = self._gather(rows_N)
                if copies is None:
                    yield columns, None
                    continue
                with torch.cuda.stream(copies):
                    columns = columns.map(lambda column_ND: column_ND.to(self.device, non_blocking=True))
                yield columns, copies.record_event()

    def _gather(self, rows_N: Tensor) -> Rows:
        """A batch in host memory, pinned when ``device`` is a GPU."""
        pinned = self.device.type == "cuda"

        def gather(columns: Sequence[VerifiedColumn]) -> Tensor | None:
            return side_by_side(columns, rows_N, pinned=pinned) if columns else None

        activations_ND = side_by_side(self._read, rows_N, pinned=pinned)
        return Rows(activations_ND, gather(self._gradients), gather(self._targets))


def side_by_side(columns: Sequence[VerifiedColumn], rows_N: Tensor, *, pinned: bool = False) -> Tensor:
    """[N, sum of widths] the rows ``rows_N`` of each column, in the type of the first, next to each other.

    Raises:
        UserError: a row is in a block that does not match its checksum.
    """
    for column in columns:
        column.require(rows_N)
    widths = [column.width for column in columns]
    batch_ND = torch.empty(len(rows_N), sum(widths), dtype=columns[0].dtype, pin_memory=pinned)
    if len(columns) == 1:
        return torch.index_select(columns[0].tensor, 0, rows_N, out=batch_ND)
    for column, part_ND in zip(columns, torch.split(batch_ND, widths, dim=1), strict=True):
        part_ND.copy_(torch.index_select(column.tensor, 0, rows_N))
    return batch_ND


class _Readahead:
    """Reads windows of the order into the page cache and verifies them, one window ahead of their use."""

    def __init__(self, order: RowOrder, columns: Sequence[VerifiedColumn]) -> None:
        self._order, self._columns = order, columns
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="readahead")
        self._ready: dict[int, Future[None]] = {}
        self._end = -1
        self._populated = False

    def enter(self, start: int, stop: int) -> None:
        """Wait until the windows of positions [start, stop) are read, and start reading the next one."""
        while start < stop:
            if start >= self._end:
                span = self._order.span_at(start)
                self._submit(span)
                self._ready.pop(span.start).result()
                self._submit(self._order.span_at(span.stop))
                self._end = span.stop
            start = min(stop, self._end)

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _submit(self, span: Span) -> None:
        if span.start not in self._ready:
            self._ready[span.start] = self._executor.submit(self._read, span)

    def _read(self, span: Span) -> None:
        ranges = self._order.prepare(span)
        if self._order.n_windows == 1 and self._populated:
            return
        for column in self._columns:
            column.require_ranges(ranges)
            for first, end in ranges:
                populate(column.tensor[first:end])
        self._populated = True
