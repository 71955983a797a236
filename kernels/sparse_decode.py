"""Decode k latents a row without forming the dense code.

Shapes: N rows, K slots a row, D = d_in, M = d_sae latents.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def sparse_decode(indices_NK: Tensor, values_NK: Tensor, W_dec_MD: Tensor) -> Tensor:
    """``x_hat[n] = sum_k values[n, k] W_dec[indices[n, k]]``, shape [N, D].

    Every row is summed in the order of its slots by one worker, so the result repeats bit for bit.
    """
    return F.embedding_bag(indices_NK, W_dec_MD, per_sample_weights=values_NK, mode="sum")
