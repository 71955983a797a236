"""Training: the loop, what it steps with, and what it leaves on disk."""

from saebench.training.loop import train
from saebench.training.run import Run

__all__ = ["Run", "train"]
