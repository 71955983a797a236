"""Scale rows, subtract an offset and change their type.

Shapes: N rows, D = d_in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saebench_kernels.dispatch import is_fused


def center(
    x_ND: Tensor, offset_D: Tensor | None = None, *, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``scale x - offset``, computed in float32, in ``dtype``; without gradients on a GPU."""
    if is_fused("center", x_ND.device, dtype, floats=True):
        from saebench_kernels.fused.center import center as fused_center

        return fused_center(x_ND, offset_D, dtype, scale=scale)
    return center_eager(x_ND, offset_D, scale=scale, dtype=dtype)


def center_eager(
    x_ND: Tensor, offset_D: Tensor | None = None, *, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``center`` in plain torch."""
    out_ND = x_ND.float() if scale == 1 else x_ND.float() * scale
    return (out_ND if offset_D is None else out_ND - offset_D).to(dtype)
