"""Synthetic data with known features, and metrics of how well an SAE recovers them."""

from saebench.evaluation.synthetic.readout import ReadoutWorld
from saebench.evaluation.synthetic.recovery import RecoveryMetrics, recovery_metrics
from saebench.evaluation.synthetic.superposition import SuperpositionWorld
from saebench.evaluation.synthetic.tree import TreeWorld
from saebench.evaluation.synthetic.truth import GroundTruth, Part, Readout, World
from saebench.evaluation.synthetic.zipf import ZipfWorld

__all__ = [
    "GroundTruth",
    "Part",
    "Readout",
    "ReadoutWorld",
    "RecoveryMetrics",
    "SuperpositionWorld",
    "TreeWorld",
    "World",
    "ZipfWorld",
    "recovery_metrics",
]
