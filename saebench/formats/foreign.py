"""``Foreign``, an SAE that was read from another library's folder, and checked reading of its tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saebench.core.errors import UserError
from saebench.core.settings import from_flat
from saebench.core.tensors import check_tensors, read_safetensors
from saebench.saes.base import SAE
from saebench.saes.registry import architecture
from saebench.saes.spec import SaeSpec


@dataclass(frozen=True)
class Foreign:
    """An SAE of another library, converted to an architecture of saebench."""

    sae: str
    """Architecture of saebench."""
    d_in: int
    spec: Mapping[str, Any]
    """Settings of the architecture."""
    weights: Mapping[str, Tensor]
    """The tensors in the architecture's ``weight_names``, float32."""
    facts: Mapping[str, Any]
    """What the folder records about its origin: ``hook_name`` and others, plain JSON values."""
    notes: tuple[str, ...] = field(default=())
    """What the user should know about the conversion, one sentence each."""

    @torch.no_grad()
    def build(self, *, source: str) -> SAE:
        """The SAE in evaluation mode.

        Raises:
            UserError: the architecture refuses the settings; the message names ``source`` as their origin.
        """
        sae_class = architecture(self.sae)
        sae: SAE = sae_class(from_flat(sae_class.Spec, self.spec, source=source), self.d_in)
        assert set(self.weights) == set(sae.weight_names), (set(self.weights), sae.weight_names)
        for name, tensor in self.weights.items():
            getattr(sae, name).copy_(tensor)
        return sae.eval()


def assumed_k(d_sae: int, notes: list[str]) -> int:
    """The k of an SAE whose folder does not record how many latents are active; a note says so."""
    assumed = min(SaeSpec.k, d_sae)
    notes.append(
        f"the folder does not record how many latents are active; k is recorded as {assumed}, which does not "
        "change the SAE; --k sets another value"
    )
    return assumed


def read_tensors(
    file: Path, expected: Mapping[str, tuple[int, ...]], *, optional: Collection[str] = ()
) -> dict[str, Tensor]:
    """The ``expected`` tensors (name -> shape) of a safetensors file, and those of ``optional`` it has.

    Tensors keep their stored dtype.

    Raises:
        UserError: the file is missing or damaged; or a tensor is missing, unexpected, of another shape, of
            integers, or not finite.
    """
    tensors = read_safetensors(file, way_out="copy the whole folder")
    check_foreign(tensors, expected, file, optional=optional)
    return tensors


def check_foreign(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    file: Path,
    *,
    optional: Collection[str] = (),
) -> None:
    """Raise a UserError unless the ``tensors`` of ``file`` are as `read_tensors` requires."""
    for name, tensor in tensors.items():
        if name not in expected and name not in optional:
            raise UserError(
                f"{file} holds {name!r}, which is not a tensor of this SAE; check its architecture"
            )
        if not tensor.is_floating_point():
            raise UserError(f"{file}: {name} holds {tensor.dtype}; weights are floating-point numbers")
    check_tensors(tensors, expected, file)
