"""Training: the loop, what it steps with, and what it leaves on disk."""

from saebench.training.loop import sweep, train
from saebench.training.run import Run

__all__ = ["Run", "sweep", "train"]
