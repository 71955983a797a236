"""Which SAE architectures there are, and where the class of each is."""

from __future__ import annotations

from typing import Any

from saebench.core.errors import UserError
from saebench.core.registry import Registry, package_of

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


architectures = Registry("an SAE architecture", "saebench.architectures", ARCHITECTURES, ALIASES)
"""With those that other packages add: classes derived from `saebench.saes.base.SAE`, whose ``Spec.name`` is
the registered name."""


def architecture(name: str) -> Any:
    """The SAE class registered as ``name``; its ``Spec`` attribute is its dataclass of settings.

    Raises:
        UserError: there is no such architecture, or the package that adds it is broken.
    """
    found = architectures.load(name)
    name = architectures.canonical(name)
    spec_name = getattr(getattr(found, "Spec", None), "name", None)
    if spec_name != name:
        raise UserError(
            f"{name!r} of the package {package_of(architectures.plugins[name])} is not an SAE class whose "
            f"Spec.name is {name!r} (it is {spec_name!r}); update that package or uninstall it"
        )
    return found
