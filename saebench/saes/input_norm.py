"""Normalization of each row before the encoder, as SAELens has it, and the way back.

    layer_norm     x' = (x - m) / (s + 1e-5), m the mean of the row's values, s their deviation (n - 1)
    constant_norm  x' = x / s, s = |x| / sqrt(d_in), m = 0

The reconstruction is x_hat = s y + m, where y = sum_i z_i d_i + b_dec is that of x'. Here codes have the
units of x: they are s z_i, so that s z_i d_i is what latent i adds to x_hat, as for every other SAE. SAELens
shows z_i.

Shapes: N rows, D = d_in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_EPSILON = 1e-5
"""Added to the standard deviation by SAELens, on the way in only."""


class RowNorm(NamedTuple):
    """The mean and scale of each row, [N, 1] float32."""

    mean_N1: Tensor
    scale_N1: Tensor

    def restored(self, y_ND: Tensor) -> Tensor:
        """s y + m."""
        return y_ND * self.scale_N1 + self.mean_N1


def normalized(x_ND: Tensor, how: str) -> tuple[Tensor, RowNorm]:
    """x' [N, D] of float32 rows, and their means and scales."""
    if how == "layer_norm":
        mean_N1 = x_ND.mean(dim=1, keepdim=True)
        centered_ND = x_ND - mean_N1
        scale_N1 = centered_ND.std(dim=1, keepdim=True)
        return centered_ND / (scale_N1 + _EPSILON), RowNorm(mean_N1, scale_N1)
    assert how == "constant_norm", how
    scale_N1 = torch.linalg.vector_norm(x_ND, dim=1, keepdim=True) / x_ND.shape[1] ** 0.5
    # A row of zeros has no direction; SAELens divides by zero.
    return x_ND / scale_N1.clamp_min(torch.finfo(x_ND.dtype).tiny), RowNorm(
        torch.zeros_like(scale_N1), scale_N1
    )
