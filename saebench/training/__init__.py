"""Training: the loop, what it steps with, and what it leaves on disk."""

from saebench.runs.run import Run
from saebench.training.loop import sweep, train

__all__ = ["Run", "sweep", "train"]
