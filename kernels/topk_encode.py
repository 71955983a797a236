"""Encode and keep the k largest pre-activations of each row: the eager reference.

Shapes: N rows, D = d_in, M = d_sae latents, K kept a row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def topk_encode(x_ND: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of ``relu(x W_enc^T + b_enc)`` in each row.

    The product is formed in the common type of ``x_ND`` and ``W_enc_MD``. A row with fewer than k positive
    pre-activations is filled up with zeros, whose indices mean nothing. The order within a row is
    unspecified; so is which of several equal values at the border is kept.

    Returns:
        ``values_NK`` in float32 and ``indices_NK`` in int64.
    """
    pre_NM = torch.addmm(b_enc_M.to(x_ND.dtype), x_ND, W_enc_MD.T)
    values_NK, indices_NK = pre_NM.topk(k, dim=1, sorted=False)
    return values_NK.float().relu_(), indices_NK
