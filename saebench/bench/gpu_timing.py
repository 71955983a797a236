"""Timing of calls and CUDA graphs with GPU events, peak memory, and short reasons for failed calls."""

from __future__ import annotations

import gc

import torch

from saebench.bench.gpu_sizes import Once
from saebench.bench.timing import Timed

CALL_SECONDS = 0.1
MOST_REPEATS = 10
"""Calls timed together, because launching one call takes longer than its first kernels run."""
_LONGEST_REASON = 100


def repeats_for(seconds: float) -> int:
    """How many calls of ``seconds`` each are timed together: as many as fit in 0.1 s, but 1 to 10."""
    return max(1, min(MOST_REPEATS, int(CALL_SECONDS / max(seconds, 1e-9))))


def timed(once: Once) -> Timed:
    """A function that returns the seconds of one call, averaged over `repeats_for` its last duration."""
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
    """Peak memory in GiB during ``calls`` calls, in addition to the memory allocated before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(calls):
        once()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


class Graph:
    """Several calls as one CUDA graph, so that kernels follow each other without launch delays."""

    calls = MOST_REPEATS

    def __init__(self, once: Once) -> None:
        for _ in range(3):
            once()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        self._kept = once  # keeps the tensors that the graph reads alive
        with torch.cuda.graph(self._graph):
            for _ in range(self.calls):
                once()

    def __call__(self) -> None:
        self._graph.replay()


def free() -> None:
    """Free unreferenced GPU memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reason(error: BaseException) -> str:
    """One short line: the type of the error and the first sentence of its message."""
    message = " ".join(str(error).split())
    sentence = message.split(". ", 1)[0].rstrip(".")
    if isinstance(error, torch.OutOfMemoryError) and ". " in message:  # the second sentence has the size
        sentence = ". ".join(message.split(". ", 2)[:2])
    text = f"{type(error).__name__}: {sentence}" if sentence else type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."
