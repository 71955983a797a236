"""What an SAE keeps: of activations (reconstruction.py) and of the model's predictions (faithfulness.py)."""

from saebench.evaluation.faithfulness import Contexts, FaithfulnessMetrics, faithfulness_metrics
from saebench.evaluation.measure import evaluate
from saebench.evaluation.reconstruction import (
    ReconstructionMeter,
    ReconstructionMetrics,
    reconstruction_metrics,
)
from saebench.evaluation.report import EvalReport

__all__ = [
    "Contexts",
    "EvalReport",
    "FaithfulnessMetrics",
    "ReconstructionMeter",
    "ReconstructionMetrics",
    "evaluate",
    "faithfulness_metrics",
    "reconstruction_metrics",
]
