"""Weight gradients of sparse codes: for each latent, a weighted sum of the rows in which it is active.

Shapes: N rows, S entries (row, latent) of all rows end to end, D = d_in, M = d_sae latents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LatentGroups(NamedTuple):
    """The entries of a batch sorted by latent, computed once and used for every weight gradient."""

    order_S: Tensor
    """Position of each sorted entry in the original order, int64."""
    rows_S: Tensor
    """Row of each sorted entry, int64."""
    starts_M: Tensor
    """Position of the first sorted entry of each latent, int64."""


def group_by_latent(indices_S: Tensor, rows_S: Tensor, d_sae: int) -> LatentGroups:
    """Sort entries by latent; stable, so that sums repeat bit for bit."""
    latents_S, order_S = torch.sort(indices_S.int(), stable=True)
    bounds_M = torch.arange(d_sae, device=indices_S.device, dtype=torch.int32)
    starts_M = torch.searchsorted(latents_S, bounds_M)
    return LatentGroups(order_S, rows_S[order_S], starts_M)


def latent_sums(groups: LatentGroups, weights_S: Tensor, table_ND: Tensor) -> Tensor:
    """``out[m] = sum over entries (n, m) of weights[s] table[n]``, shape [M, D].

    Each latent is summed in the order of its entries by one worker: without atomics, and without a dense
    [N, M] matrix.
    """
    return F.embedding_bag(
        groups.rows_S,
        table_ND,
        groups.starts_M,
        per_sample_weights=weights_S[groups.order_S],
        mode="sum",
    )
