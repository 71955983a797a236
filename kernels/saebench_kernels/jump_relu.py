"""JumpReLU and its step function, with pseudo-derivatives for the thresholds (arXiv 2407.14435).

Shapes: S entries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def jump_relu(pre_S: Tensor, threshold_S: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """``z = pre * H(pre - threshold)`` and ``H(pre - threshold)``, both [S]; H is the step function.

    With eps = ``bandwidth`` * threshold and K the rectangle of width and height 1 around 0, the gradients are

        dz / dpre = H(pre - threshold),    dz / dthreshold = -(threshold / eps) K((pre - threshold) / eps),
        dH / dpre = 0,                     dH / dthreshold = -(1 / eps) K((pre - threshold) / eps).
    """
    z_S, active_S = _JumpRelu.apply(pre_S, threshold_S, bandwidth)  # type: ignore[no-untyped-call]
    return z_S, active_S


class _JumpRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_S: Tensor, threshold_S: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        active_S = (pre_S > threshold_S).to(pre_S.dtype)
        ctx.bandwidth = bandwidth
        ctx.save_for_backward(pre_S, threshold_S, active_S)
        return pre_S * active_S, active_S

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_z_S, d_active_S = grads
        pre_S, threshold_S, active_S = ctx.saved_tensors
        eps_S = ctx.bandwidth * threshold_S
        inside_S = (pre_S - threshold_S).abs() < eps_S / 2
        d_threshold_S = -(threshold_S * d_z_S + d_active_S) / eps_S * inside_S
        return d_z_S * active_S, d_threshold_S, None
