"""The suite on synthetic data: SAEs trained where the truth is known, the papers' claims put to the test."""

from saebench.synth.report import SynthReport
from saebench.synth.suite import synth

__all__ = ["SynthReport", "synth"]
