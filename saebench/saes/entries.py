"""A parameter of each latent, looked up at every entry of sparse codes.

Shapes: N rows, S entries of all rows end to end, M = d_sae latents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saebench.core.codes import SparseCodes
from saebench_kernels import latent_sums


def at_entries(parameter_M: Tensor, codes: SparseCodes) -> Tensor:
    """``parameter[index]`` of every entry, [S]; its gradient is summed latent by latent, in a fixed order."""
    if not torch.is_grad_enabled():
        return parameter_M[codes.indices]
    looked_up_S: Tensor = _LookUp.apply(parameter_M, codes)  # type: ignore[no-untyped-call]
    return looked_up_S


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter_M: Tensor, codes: SparseCodes) -> Tensor:
        ctx.codes = codes
        return parameter_M[codes.indices]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ones_N1 = grads[0].new_ones(ctx.codes.n_rows, 1)
        return latent_sums(ctx.codes.groups, grads[0], ones_N1)[:, 0], None
