"""The old place of the settings; each class is now in the ``settings`` module of its stage.

Names imported from here still work in this version, with a DeprecationWarning.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

from saebench.core.deprecation import warn_renamed

ForeignFormat = Literal["saelens"]
StoreFormat = Literal["parquet", "html", "delphi", "neuronpedia"]
"""Types of settings whose values are the names of a registry now."""

_HOMES = {
    "ALIASES": "saebench.saes.registry",
    "ARCHITECTURES": "saebench.saes.registry",
    "BenchConfig": "saebench.bench.settings",
    "CheckConfig": "saebench.store.settings",
    "CompareConfig": "saebench.evaluation.settings",
    "ComputeDtype": "saebench.training.settings",
    "DEMO_HOOK": "saebench.activations.settings",
    "DemoConfig": "saebench.demo",
    "EffectsConfig": "saebench.analysis.settings",
    "EvalConfig": "saebench.evaluation.settings",
    "ExplainConfig": "saebench.explaining.settings",
    "ExportConfig": "saebench.formats.settings",
    "HarvestConfig": "saebench.activations.settings",
    "ImportConfig": "saebench.activations.settings",
    "ImportSaeConfig": "saebench.formats.settings",
    "IndexConfig": "saebench.store.settings",
    "MAX_SHARDS": "saebench.activations.settings",
    "RebuildConfig": "saebench.store.settings",
    "SaeSpec": "saebench.saes.spec",
    "StoreExportConfig": "saebench.store.settings",
    "StoredDtype": "saebench.activations.settings",
    "SynthConfig": "saebench.synth.settings",
    "SyntheticData": "saebench.synth.settings",
    "TrainConfig": "saebench.training.settings",
    "architecture": "saebench.saes.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'saebench.config' has no attribute {name!r}")
    warn_renamed(f"saebench.config.{name}", f"{_HOMES[name]}.{name}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
