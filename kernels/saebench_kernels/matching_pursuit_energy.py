"""The squared norm that a matching pursuit leaves, differentiable through the whole recursion.

Shapes: N rows, D = d_in, M atoms, K picks per row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saebench_kernels.entries import Entries, Pursuit
from saebench_kernels.matching_pursuit_coefficients import matching_pursuit_coefficients
from saebench_kernels.matching_pursuit_encode import (
    is_pursuit_fused,
    matching_pursuit_encode_eager,
    pursue_fused,
)
from saebench_kernels.sparse_decode import sparse_decode


def matching_pursuit_energy(
    x_ND: Tensor,
    atoms_MD: Tensor,
    b_D: Tensor,
    k: int,
    *,
    tolerance: Tensor | float = 0.0,
    absolute: bool = False,
    scan_dtype: torch.dtype = torch.float32,
    fused: bool | None = None,
) -> tuple[Tensor, Pursuit]:
    """``sum |r|^2`` of the residuals r that a pursuit of x - b leaves (a scalar), and the pursuit, detached.

    Arguments as for `matching_pursuit_encode`; where ``fused`` is None, `is_pursuit_fused` decides.
    Differentiable in ``atoms`` (float32, of unit norm) and ``b``, the picks held fixed; ``x`` is data.
    """
    if fused is None:
        fused = is_pursuit_fused(x_ND.device, scan_dtype, n_rows=len(x_ND), d_sae=len(atoms_MD))
    if fused:
        return matching_pursuit_energy_fused(x_ND, atoms_MD, b_D, k, tolerance=tolerance, absolute=absolute)
    return matching_pursuit_energy_eager(
        x_ND, atoms_MD, b_D, k, tolerance=tolerance, absolute=absolute, scan_dtype=scan_dtype
    )


def matching_pursuit_energy_eager(
    x_ND: Tensor,
    atoms_MD: Tensor,
    b_D: Tensor,
    k: int,
    *,
    tolerance: Tensor | float = 0.0,
    absolute: bool = False,
    scan_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Pursuit]:
    """`matching_pursuit_energy` in plain torch."""
    with torch.no_grad():
        values_NK, indices_NK = matching_pursuit_encode_eager(
            x_ND - b_D, atoms_MD, k, tolerance=tolerance, absolute=absolute, scan_dtype=scan_dtype
        )
    entries = Entries(indices_NK.to(torch.int32).view(-1), len(atoms_MD), len(x_ND), k=k)
    values_S = matching_pursuit_coefficients(values_NK.view(-1), entries, x_ND, atoms_MD, b_D)
    residual_ND = x_ND - sparse_decode(values_S, entries, atoms_MD, b_D)
    return residual_ND.square().sum(), Pursuit(values_NK, indices_NK, residual_ND.detach())


def matching_pursuit_energy_fused(
    x_ND: Tensor,
    atoms_MD: Tensor,
    b_D: Tensor,
    k: int,
    *,
    tolerance: Tensor | float = 0.0,
    absolute: bool = False,
) -> tuple[Tensor, Pursuit]:
    """`matching_pursuit_energy` by fused kernels; nothing waits for the GPU."""
    with torch.no_grad():
        found = pursue_fused(x_ND - b_D, atoms_MD, k, tolerance=tolerance, absolute=absolute)
    energy: Tensor = _FusedEnergy.apply(atoms_MD, b_D, found)  # type: ignore[no-untyped-call]
    return energy, found


class _FusedEnergy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, atoms_MD: Tensor, b_D: Tensor, found: Pursuit) -> Tensor:
        ctx.found = found
        ctx.save_for_backward(atoms_MD)
        norm: Tensor = torch.linalg.vector_norm(found.residual_ND, dtype=torch.float32)
        return norm.square()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        from saebench_kernels.fused.pursuit import energy_gradients

        (atoms_MD,) = ctx.saved_tensors
        return *energy_gradients(ctx.found, atoms_MD, 2 * grads[0]), None
