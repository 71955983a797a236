"""The factors by which a training multiplies activations: one per site that is read or reconstructed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


class NormLimit(NamedTuple):
    """Rows of a site whose norm is above ``limit`` are scaled to the norm ``target``."""

    limit: float
    target: float


@dataclass(frozen=True)
class NormClip:
    """Scales massive rows down, so that they weigh no more in a training than other rows do.

    One `NormLimit` or None for each site, and for each target of a transcoder. The direction of a row is
    kept: an SAE whose activation function is homogeneous reconstructs s x nearly s times as x, where x is
    large beside the biases, so it learns a massive row from its scaled copy.
    """

    sites: tuple[NormLimit | None, ...] = (None,)
    targets: tuple[NormLimit | None, ...] = ()

    def __bool__(self) -> bool:
        return any((*self.sites, *self.targets))

    def batch(self, rows: Batch, spec: SaeSpec) -> Batch:
        """Unscaled rows, with massive ones scaled down; in float32 where that can be."""
        target_NE = rows.target_NE
        if target_NE is not None and any(self.targets):
            target_NE = _clipped(target_NE, self.targets, spec.targets)
        x_ND = self.rows(rows.x_ND, spec)
        return Batch(x_ND, rows.gradient_ND, rows.progress, target_NE=target_NE)

    def rows(self, x_ND: Tensor, spec: SaeSpec) -> Tensor:
        """The same for the rows of the sites alone."""
        return _clipped(x_ND, self.sites, spec.sites) if any(self.sites) else x_ND


def _clipped(x_ND: Tensor, limits: Sequence[NormLimit | None], sites: Sequence[SiteWidth]) -> Tensor:
    parts = []
    for (part_Nd, _), at in zip(_parts(x_ND.float(), sites), limits, strict=True):
        if at is not None:
            norm_N1 = torch.linalg.vector_norm(part_Nd, dim=1, keepdim=True)
            part_Nd = torch.where(norm_N1 > at.limit, part_Nd * (at.target / norm_N1), part_Nd)
        parts.append(part_Nd)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class Scaler:
    """Scales rows of activations on a device, after massive rows among them were scaled down by ``clip``."""

    def __init__(
        self, scales: Scales, spec: SaeSpec, device: torch.device, clip: NormClip | None = None
    ) -> None:
        self._spec, self._clip = spec, clip
        targets, of = (scales.targets, spec.targets) if scales.targets else (scales.sites, spec.sites)
        self._site = _factor(scales.sites, spec.sites, device)
        self._target = _factor(targets, of, device)
        self._gradient = _factor([targets[0] / scale for scale in targets], of, device)

    def sites(self, x_ND: Tensor) -> Tensor:
        """Rows [N, D] of any float type, each site times its scale, float32."""
        if self._clip:
            x_ND = self._clip.rows(x_ND, self._spec)
        return _times(x_ND, self._site)

    def batch(self, rows: Batch) -> Batch:
        """The batch of these unscaled rows, of any float type.

        Gradients are those of the loss for the unscaled targets. Where targets have several scales s_i, they
        are multiplied by s_0 / s_i, so that a latent's effect W_dec g does not depend on the scales.
        """
        if self._clip:
            rows = self._clip.batch(rows, self._spec)
        gradient_NE, target_NE = rows.gradient_ND, rows.target_NE
        if gradient_NE is not None:
            gradient_NE = _times(gradient_NE, self._gradient)
        if target_NE is not None:
            target_NE = _times(target_NE, self._target)
        x_ND = _times(rows.x_ND, self._site)
        return Batch(x_ND, gradient_NE, rows.progress, target_NE=target_NE)


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
