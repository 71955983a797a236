"""Timing on a GPU: by events around several calls, or as a graph; and what is said of a call that failed."""

from __future__ import annotations

import gc

import torch

from saebench.bench.gpu_sizes import Once
from saebench.bench.timing import Timed

CALL_SECONDS = 0.1
MOST_REPEATS = 10
"""Calls timed together: launching one takes longer than its first kernels. Fewer where they are slow."""
_LONGEST_REASON = 100


def repeats_for(seconds: float) -> int:
    """How many calls of ``seconds`` each are timed together: what fits into 0.1 s, 1 to 10."""
    return max(1, min(MOST_REPEATS, int(CALL_SECONDS / max(seconds, 1e-9))))


def timed(once: Once) -> Timed:
    """Seconds of one call, from events around as many as its last duration suggests; at first, around one."""
    repeats, calls = 1, once.calls if isinstance(once, Graph) else 1

    def measured() -> float:
        nonlocal repeats
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(repeats):
            once()
        end.record()
        end.synchronize()
        seconds = float(begin.elapsed_time(end)) / 1e3 / repeats
        repeats = repeats_for(seconds)
        return seconds / calls

    return measured


def peak_gib(once: Once, calls: int) -> float:
    """The most memory that ``calls`` take at once, beyond what was taken before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(calls):
        once()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


class Graph:
    """Several calls as one CUDA graph: within it they follow each other as the kernels of a step do."""

    calls = MOST_REPEATS

    def __init__(self, once: Once) -> None:
        for _ in range(3):
            once()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        self._kept = once  # with it, the tensors that the graph reads
        with torch.cuda.graph(self._graph):
            for _ in range(self.calls):
                once()

    def __call__(self) -> None:
        self._graph.replay()


def free() -> None:
    """Give back to the GPU what nothing refers to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reason(error: BaseException) -> str:
    """One short line: the kind of error and the first sentence of what it says."""
    said = " ".join(str(error).split())
    sentence = said.split(". ", 1)[0].rstrip(".")
    if isinstance(error, torch.OutOfMemoryError) and ". " in said:  # the second one says how much
        sentence = ". ".join(said.split(". ", 2)[:2])
    text = f"{type(error).__name__}: {sentence}" if sentence else type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."
