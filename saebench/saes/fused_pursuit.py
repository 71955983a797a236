"""What a matching pursuit leaves, as one differentiable function with the fused kernels of a GPU.

Shapes: N rows, D = d_in, M atoms, K picks a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saebench_kernels import pursue_fused

if TYPE_CHECKING:
    from saebench_kernels.fused.pursuit import Pursuit


def energy_left(
    x_ND: Tensor, atoms_MD: Tensor, b_D: Tensor, k: int, *, tolerance: Tensor | float, absolute: bool
) -> tuple[Tensor, Pursuit]:
    """``sum |r|^2`` of the residuals that a pursuit of x - b leaves, and the pursuit.

    Differentiable in ``atoms`` (float32, of unit norm) and ``b``, through the whole recursion, the picks
    held fixed.
    """
    with torch.no_grad():
        found = pursue_fused(x_ND - b_D, atoms_MD, k, tolerance=tolerance, absolute=absolute)
    energy: Tensor = _Energy.apply(atoms_MD, b_D, found)  # type: ignore[no-untyped-call]
    return energy, found


class _Energy(torch.autograd.Function):
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
