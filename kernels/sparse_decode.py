"""Decode k latents a row without forming the dense code, and the gradient of that with respect to values.

Shapes: N rows, K slots a row, D = d_in, M = d_sae latents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ELEMENTS_GATHERED_AT_ONCE = 1 << 22


def sparse_decode(indices_NK: Tensor, values_NK: Tensor, W_dec_MD: Tensor) -> Tensor:
    """``x_hat[n] = sum_k values[n, k] W_dec[indices[n, k]]``, shape [N, D].

    Every row is summed in the order of its slots by one worker, so the result repeats bit for bit.
    """
    return F.embedding_bag(indices_NK, W_dec_MD, per_sample_weights=values_NK, mode="sum")


def sparse_decode_values_grad(indices_NK: Tensor, d_x_hat_ND: Tensor, W_dec_MD: Tensor) -> Tensor:
    """Gradient of ``sparse_decode`` with respect to its values: ``d[n, k] = d_x_hat[n] . W_dec[indices[n, k]]``.

    Rows are gathered a few at a time, so that the [N, K, D] tensor never exists.
    """
    n_rows, k = indices_NK.shape
    d_values_NK = torch.empty(n_rows, k, dtype=W_dec_MD.dtype, device=W_dec_MD.device)
    step = max(1, _ELEMENTS_GATHERED_AT_ONCE // (k * W_dec_MD.shape[1]))
    if W_dec_MD.is_cuda:
        step *= 64
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        atoms_nKD = F.embedding(indices_NK[rows], W_dec_MD)
        torch.matmul(atoms_nKD, d_x_hat_ND[rows].unsqueeze(2), out=d_values_NK[rows].unsqueeze(2))
    return d_values_NK
