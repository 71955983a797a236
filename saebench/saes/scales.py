"""The factors by which a training multiplies activations: one per site that is read or reconstructed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.core.errors import UserError
from saebench.saes.base import Batch
from saebench.saes.spec import SaeSpec, SiteWidth
from saebench_kernels import center

SCALE, TARGET_SCALE = "scale", "target_scale"


@dataclass(frozen=True)
class Scales:
    """``sites`` has a factor for each site, ``targets`` one for each target of a transcoder (else none)."""

    sites: tuple[float, ...]
    targets: tuple[float, ...] = ()

    @classmethod
    def of_sample(cls, x_ND: Tensor, target_NE: Tensor | None, spec: SaeSpec) -> Scales:
        """s with E |s (x - mean x)|^2 = width, for each site and target of a sample of rows.

        Raises:
            UserError: a site does not vary.
        """
        sites = tuple(unit_scale(part, site) for part, site in _parts(x_ND, spec.sites))
        if target_NE is None:
            return cls(sites)
        return cls(sites, tuple(unit_scale(part, site) for part, site in _parts(target_NE, spec.targets)))

    @classmethod
    def ones(cls, spec: SaeSpec) -> Scales:
        """No scaling."""
        targets = len(spec.targets) if spec.is_transcoder else 0
        return cls((1.0,) * max(1, len(spec.sites)), (1.0,) * targets)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: float64 scalars, or vectors for several sites."""
        of_sites = torch.tensor(self.sites, dtype=torch.float64)
        found = {SCALE: of_sites[0] if len(self.sites) == 1 else of_sites}
        if self.targets:
            found[TARGET_SCALE] = torch.tensor(self.targets, dtype=torch.float64)
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Scales:
        """The inverse of ``tensors``."""
        targets = tensors[TARGET_SCALE].tolist() if TARGET_SCALE in tensors else ()
        return cls(tuple(tensors[SCALE].reshape(-1).tolist()), tuple(targets))


class Scaler:
    """Scales rows of activations on a device."""

    def __init__(self, scales: Scales, spec: SaeSpec, device: torch.device) -> None:
        targets, of = (scales.targets, spec.targets) if scales.targets else (scales.sites, spec.sites)
        self._site = _factor(scales.sites, spec.sites, device)
        self._target = _factor(targets, of, device)
        self._gradient = _factor([targets[0] / scale for scale in targets], of, device)

    def sites(self, x_ND: Tensor) -> Tensor:
        """Rows [N, D] of any float type, each site times its scale, float32."""
        return _times(x_ND, self._site)

    def batch(self, rows: Batch) -> Batch:
        """The batch of these unscaled rows, of any float type.

        Gradients are those of the loss for the unscaled targets. Where targets have several scales s_i, they
        are multiplied by s_0 / s_i, so that a latent's effect W_dec g does not depend on the scales.
        """
        gradient_NE, target_NE = rows.gradient_ND, rows.target_NE
        if gradient_NE is not None:
            gradient_NE = _times(gradient_NE, self._gradient)
        if target_NE is not None:
            target_NE = _times(target_NE, self._target)
        return Batch(self.sites(rows.x_ND), gradient_NE, rows.progress, target_NE=target_NE)


def _factor(values: Sequence[float], of: Sequence[SiteWidth], device: torch.device) -> float | Tensor:
    """A number for one site, or [sum of widths] float32 for several."""
    if len(values) == 1:
        return values[0]
    widths = torch.tensor([site.width for site in of])
    return torch.tensor(values, dtype=torch.float64).repeat_interleave(widths).float().to(device)


def _times(x_ND: Tensor, factor: float | Tensor) -> Tensor:
    return x_ND.float() * factor if isinstance(factor, Tensor) else center(x_ND, scale=factor)


def unit_scale(x_ND: Tensor, site: SiteWidth | None = None) -> float:
    """s with E |s (x - mean x)|^2 = d_in.

    Raises:
        UserError: all rows are equal.
    """
    variance = x_ND.double().var(0, correction=0).mean().item()
    if variance == 0:
        where = f" at {site.name}" if site is not None else ""
        raise UserError(
            f"all activations in the cache{where} are equal, so there is nothing to learn; check the site"
        )
    return 1 / math.sqrt(variance)


def _parts(x_ND: Tensor, sites: Sequence[SiteWidth]) -> list[tuple[Tensor, SiteWidth | None]]:
    if not sites:
        return [(x_ND, None)]
    return list(zip(torch.split(x_ND, [site.width for site in sites], dim=1), sites, strict=True))
