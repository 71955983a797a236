"""Evaluation of SAEs: reconstruction of activations, and faithfulness of the model's predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saebench.core.lazy import lazy_names

if TYPE_CHECKING:
    from saebench.evaluation.faithfulness import Contexts, FaithfulnessMetrics, faithfulness_metrics
    from saebench.evaluation.measure import evaluate
    from saebench.evaluation.reconstruction import (
        ReconstructionMeter,
        ReconstructionMetrics,
        reconstruction_metrics,
    )
    from saebench.evaluation.report import EvalReport

_HOMES = {
    "Contexts": "faithfulness",
    "EvalReport": "report",
    "FaithfulnessMetrics": "faithfulness",
    "ReconstructionMeter": "reconstruction",
    "ReconstructionMetrics": "reconstruction",
    "evaluate": "measure",
    "faithfulness_metrics": "faithfulness",
    "reconstruction_metrics": "reconstruction",
}

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

__getattr__ = lazy_names(__name__, _HOMES)
