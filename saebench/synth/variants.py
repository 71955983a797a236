"""The SAEs that the suite trains on each data set, and their inference modes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from saebench.core.settings import from_flat
from saebench.saes.registry import ARCHITECTURES, architecture, architectures
from saebench.saes.spec import SaeSpec
from saebench.synth.data import DataSet

BETAS = (0.3, 1.0, 3.0, 10.0)
"""Values of beta for the gradient SAE."""
TREE_TOLERANCE = 0.05
"""Residual norm, in the units of the data, at which the authors of MP-SAE stop pursuit on the tree."""
SCALE_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One architecture with the settings that the suite uses, other than d_sae and k."""

    name: str
    """Label of its results, and the name of its runs."""
    sae: str
    settings: dict[str, Any] = field(default_factory=dict)
    inferences: tuple[str, ...] = ("plain",)
    """Inference modes to measure; 'oracle' reads each row's gradient."""

    def spec(self, data: DataSet) -> SaeSpec:
        values = {"d_sae": data.d_sae, "k": data.k, **self.settings}
        spec: SaeSpec = from_flat(architecture(self.sae).Spec, values, source=f"the suite's {self.name}")
        return spec


def variants(names: Sequence[str], data: DataSet) -> list[Variant]:
    """The variants of the architectures ``names`` (by default all) that are trained on ``data``.

    Architectures that need gradients are trained only on data with gradients, once for each beta. On the
    tree, matching pursuit has two variants: its authors', which stops if the residual is small or a pick is
    repeated, and one with at most k picks. All other settings are the defaults; none is tuned.
    """
    made = []
    for name in dict.fromkeys(map(architectures.canonical, names or ARCHITECTURES)):
        sae_class = architecture(name)
        if sae_class.uses_gradients:
            if data.world.readout_weights() is not None:
                made += [
                    Variant(
                        name=f"{name}-beta{beta:g}",
                        sae=name,
                        settings={"beta": beta},
                        inferences=sae_class.inferences,
                    )
                    for beta in BETAS
                ]
        elif name == "matching-pursuit" and data.kind == "tree":
            stop: dict[str, Any] = {"tolerance": _tree_tolerance(data)}
            own = {**stop, "k": data.d_sae, "stop_on_repeat": True}
            made.append(Variant(name=name, sae=name, settings=own))
            made.append(Variant(name=f"{name}-k{data.k}", sae=name, settings=stop))
        else:
            made.append(Variant(name=name, sae=name))
    return made


def _tree_tolerance(data: DataSet) -> float:
    """``TREE_TOLERANCE`` scaled to the inputs of training, which have unit variance, rounded to 2 digits."""
    sample = data.world.sample(SCALE_ROWS)
    deviation = math.sqrt(sample.x_ND.double().var(0, correction=0).mean().item())
    return round(TREE_TOLERANCE / deviation, 2)
