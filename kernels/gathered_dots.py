"""Dot products of each row with the few table rows that it names.

Shapes: N rows, K slots a row, D columns, M table rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gathered_dots(indices_NK: Tensor, x_ND: Tensor, table_MD: Tensor) -> Tensor:
    """``out[n, k] = x[n] . table[indices[n, k]]``, without forming the gathered [N, K, D] tensor.

    This is the gradient of ``sparse_decode`` with respect to its values, and torch's own fused kernel for
    that gradient computes it (the weights at which it is taken do not matter: the decode is linear).
    """
    with torch.enable_grad():
        at_NK = torch.zeros(indices_NK.shape, dtype=x_ND.dtype, device=x_ND.device, requires_grad=True)
        decoded_ND = F.embedding_bag(indices_NK, table_MD.detach(), per_sample_weights=at_NK, mode="sum")
        (dots_NK,) = torch.autograd.grad(decoded_ND, at_NK, x_ND.detach())
    return dots_NK
