"""The synthetic suite: train SAEs on data with known features, and test the papers' claims."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saebench.core.lazy import lazy_names

if TYPE_CHECKING:
    from saebench.synth.report import SynthReport
    from saebench.synth.suite import synth

__all__ = ["SynthReport", "synth"]

__getattr__ = lazy_names(__name__, {"SynthReport": "report", "synth": "suite"})
