"""Gather one parameter per latent at the entries of sparse codes.

Shapes: N rows, S entries of all rows end to end, M = d_sae latents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saebench_kernels.entries import Entries
from saebench_kernels.latent_sums import latent_sums


def gather_latents(parameter_M: Tensor, entries: Entries) -> Tensor:
    """``parameter[index]`` of every entry, [S]. Its gradient is summed per latent, in a fixed order."""
    if not torch.is_grad_enabled():
        return parameter_M[entries.indices]
    gathered_S: Tensor = _GatherLatents.apply(parameter_M, entries)  # type: ignore[no-untyped-call]
    return gathered_S


class _GatherLatents(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter_M: Tensor, entries: Entries) -> Tensor:
        ctx.entries = entries
        return parameter_M[entries.indices]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ones_N1 = grads[0].new_ones(ctx.entries.n_rows, 1)
        return latent_sums(ctx.entries.groups, grads[0], ones_N1)[:, 0], None
