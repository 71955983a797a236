"""Decode the few active latents of each row without forming the dense code.

Shapes: N rows, S entries of all rows end to end, D = d_in, M = d_sae latents.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def sparse_decode(indices_S: Tensor, starts_N: Tensor, values_S: Tensor, W_dec_MD: Tensor) -> Tensor:
    """``x_hat[n] = sum over entries s of row n of values[s] W_dec[indices[s]]``, shape [N, D].

    Row n's entries begin at ``starts[n]``; indices and starts are of one integer type. Every row is summed
    in the order of its entries by one worker, so the result repeats bit for bit.
    """
    return F.embedding_bag(indices_S, W_dec_MD, starts_N, per_sample_weights=values_S, mode="sum")
