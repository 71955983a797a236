"""Rows in chunks, on a CPU each worked on by one thread from beginning to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

ResultT = TypeVar("ResultT")


def map_chunks(
    work: Callable[[slice], ResultT], n_rows: int, chunk: int, device: torch.device
) -> Iterator[ResultT]:
    """What ``work`` gives, without gradients, for slices of ``chunk`` rows that together are 0 to ``n_rows``.

    On a CPU as many chunks are at work as torch has threads, each on one thread. Where a chunk is hundreds
    of short operations this replaces hundreds of times at which all threads must wait for the last one.
    That matters when other processes use the cores too: then each wait may take until the operating system
    gives the last thread its turn. Results come in the order of the rows, whichever thread made them.
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
        # The number is kept for each thread, but new threads begin with the one that was set last.
        torch.set_num_threads(n_threads)
