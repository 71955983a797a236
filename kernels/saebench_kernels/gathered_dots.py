"""Dot products of each row with a few rows of a table.

Shapes: N rows, S entries of all rows end to end, D columns, M table rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gathered_dots(indices_S: Tensor, starts_N: Tensor, x_ND: Tensor, table_MD: Tensor) -> Tensor:
    """``out[s] = x[n] . table[indices[s]]`` for the entries s of row n, without an [S, D] tensor.

    The entries of row n begin at ``starts[n]``; indices and starts have the same integer type. This is the
    gradient of ``sparse_decode`` with respect to its values, so torch's own kernel for that gradient computes
    it. The values at which the gradient is taken do not matter, since the decoder is linear.
    """
    with torch.enable_grad():
        at_S = torch.zeros(indices_S.shape, dtype=x_ND.dtype, device=x_ND.device, requires_grad=True)
        decoded_ND = F.embedding_bag(
            indices_S, table_MD.detach(), starts_N, per_sample_weights=at_S, mode="sum"
        )
        (dots_S,) = torch.autograd.grad(decoded_ND, at_S, x_ND.detach())
    return dots_S
