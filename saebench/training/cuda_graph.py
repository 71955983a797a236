"""Training steps as a CUDA graph: captured once, replayed with one call.

A step is about forty short kernels; launching them one by one takes longer than running them. The kernels and
their order are the same in both cases, and so is every bit of the result.

Shapes: N rows in a batch, D = d_in.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from saebench.activations.loader import Rows
from saebench.saes.base import Batch, LossTerms

STEPS_BEFORE_CAPTURE = 3
"""Steps taken one kernel at a time before the capture: they compile kernels and fill the allocator."""


class StepOutput(NamedTuple):
    """What a step leaves for the metrics. A captured step overwrites it the next time."""

    batch: Batch
    terms: LossTerms
    grad_norm: Tensor


class GraphedStep:
    """A training step, replayed as a CUDA graph where ``SAE.graph_key`` and the shapes allow it.

    Args:
        step: takes one step on rows at a progress with a learning rate (a float64 scalar when captured).
        graph_key: identifies the kernels of a step; a step with a new key is captured again.
    """

    def __init__(
        self,
        step: Callable[[Rows, float, float | Tensor], StepOutput],
        graph_key: Callable[[float], Hashable | None],
    ) -> None:
        self._step, self._graph_key = step, graph_key
        self._key: Hashable = None
        self._n_taken = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._rows: Rows
        self._lr: Tensor
        self._output: StepOutput

    def __call__(self, rows: Rows, progress: float, lr: float) -> StepOutput:
        """One step on ``rows``."""
        graph_key = self._graph_key(progress) if rows.activations.is_cuda else None
        if graph_key is None:
            return self._step(rows, progress, lr)
        key = (graph_key, *((column.shape, column.dtype) for column in rows if column is not None))
        if key != self._key:
            self._key, self._n_taken, self._graph = key, 0, None
        if self._graph is None:
            self._n_taken += 1
            if self._n_taken <= STEPS_BEFORE_CAPTURE:
                return self._step(rows, progress, lr)
            self._capture(rows, progress)
        for kept, column in zip(self._rows, rows, strict=True):
            if kept is not None and column is not None:
                kept.copy_(column, non_blocking=True)
        self._lr.fill_(lr)
        assert self._graph is not None
        self._graph.replay()
        return self._output

    def _capture(self, rows: Rows, progress: float) -> None:
        self._rows = rows.map(torch.empty_like)
        self._lr = torch.zeros((), dtype=torch.float64, device=rows.activations.device)
        self._graph = torch.cuda.CUDAGraph()
        # Meanwhile the loader allocates pinned memory in a thread of its own.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._output = self._step(self._rows, progress, self._lr)
