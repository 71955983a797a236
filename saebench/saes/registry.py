"""Which architectures there are, and where the class of each is."""

from __future__ import annotations

import importlib
from typing import Any

from saebench.core.errors import UserError

ARCHITECTURES = {
    "topk": "saebench.saes.topk:TopKSAE",
    "matching-pursuit": "saebench.saes.matching_pursuit:MatchingPursuitSAE",
    "mutual-choice": "saebench.saes.mutual_choice:MutualChoiceSAE",
    "feature-choice": "saebench.saes.feature_choice:FeatureChoiceSAE",
    "gradient": "saebench.saes.gradient:GradientSAE",
    "matryoshka": "saebench.saes.matryoshka:MatryoshkaSAE",
    "jumprelu": "saebench.saes.jumprelu:JumpReluSAE",
    "gated": "saebench.saes.gated:GatedSAE",
    "relu": "saebench.saes.relu:ReluSAE",
}
"""Name -> where the class is. A new architecture is one file in saebench/saes and one line here."""
ALIASES = {"batchtopk": "mutual-choice"}
"""Other accepted names; what is written to disk has the first."""


def architecture(name: str) -> Any:
    """The SAE class registered as ``name``; its ``Spec`` attribute is its dataclass of settings."""
    name = ALIASES.get(name, name)
    if name not in ARCHITECTURES:
        raise UserError(f"{name!r} is not an SAE architecture; there is {', '.join(ARCHITECTURES)}")
    module, _, attribute = ARCHITECTURES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
