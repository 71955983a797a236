"""Which SAEs the suite trains on which data, and in which ways each is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from saebench.config import ARCHITECTURES, SaeSpec, architecture
from saebench.fields import from_flat
from saebench.synth.data import DataSet

BETAS = (0.3, 1.0, 3.0, 10.0)
INFERENCES = ("plain", "proxy", "oracle")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One architecture with the settings that the suite gives it beside d_sae and k."""

    sae: str
    settings: dict[str, Any] = field(default_factory=dict)
    inferences: tuple[str, ...] = ("plain",)
    """Ways to read it: 'oracle' is shown each row's gradient."""

    @property
    def name(self) -> str:
        """Name of its runs, and the label of its results."""
        return "-".join([self.sae, *(f"{key}{value:g}" for key, value in self.settings.items())])

    def spec(self, data: DataSet) -> SaeSpec:
        values = {"d_sae": data.d_sae, "k": data.k, **self.settings}
        spec: SaeSpec = from_flat(architecture(self.sae).Spec, values, source=f"the suite's {self.name}")
        return spec


def variants(names: Sequence[str], data: DataSet) -> list[Variant]:
    """What is trained on ``data``, of the architectures ``names``.

    Those that need gradients are trained where the data have them, once for each beta. No setting is tuned
    to the data: learning rates and all else are the defaults.
    """
    made = []
    for name in names:
        if not architecture(name).uses_gradients:
            made.append(Variant(sae=name, settings=_settings(name, data)))
        elif data.world.readout_weights() is not None:
            made += [Variant(sae=name, settings={"beta": beta}, inferences=INFERENCES) for beta in BETAS]
    return made


def all_architectures() -> tuple[str, ...]:
    """Every registered architecture under its own name; aliases are left out."""
    return tuple(name for name in ARCHITECTURES if architecture(name).Spec.name == name)


def _settings(name: str, data: DataSet) -> dict[str, Any]:
    """What the benchmark's definition asks of an architecture."""
    return {}
