"""Training of SAEs: the loop, the optimizer, sweeps, checkpoints and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saebench.core.lazy import lazy_names

if TYPE_CHECKING:
    from saebench.runs.run import Run
    from saebench.training.loop import sweep, train

__all__ = ["Run", "sweep", "train"]

__getattr__ = lazy_names(__name__, {"Run": "loop", "sweep": "loop", "train": "loop"})
