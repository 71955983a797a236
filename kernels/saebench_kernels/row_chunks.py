"""Map a function over chunks of rows; on a CPU, each chunk is processed by one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

ResultT = TypeVar("ResultT")


def map_chunks(
    work: Callable[[slice], ResultT], n_rows: int, chunk: int, device: torch.device
) -> Iterator[ResultT]:
    """Results of ``work``, without gradients, for slices of ``chunk`` rows that together cover ``n_rows``.

    On a CPU, as many chunks are processed at once as torch has threads, each on one thread. Where a chunk is
    hundreds of short operations, this avoids hundreds of points at which all threads wait for the last one.
    That matters when other processes use the cores: then each wait may last until the operating system
    schedules the last thread. Results are in the order of the rows.
    """
    chunks = [slice(start, min(start + chunk, n_rows)) for start in range(0, n_rows, chunk)]
    n_threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def alone(rows: slice) -> ResultT:
        with torch.inference_mode(inference), torch.no_grad():
            return work(rows)

    n_workers = min(n_threads, len(chunks)) if device.type == "cpu" else 1
    if n_workers <= 1:
        yield from map(alone, chunks)
        return
    try:
        with ThreadPoolExecutor(n_workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(alone, chunks)
    finally:
        # The number is kept per thread, but new threads start with the one that was set last.
        torch.set_num_threads(n_threads)
