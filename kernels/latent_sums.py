"""Weight gradients of sparse codes: for each latent, a weighted sum of the rows in which it is active.

Shapes: N rows, K slots a row, S = N K pairs, D = d_in, M = d_sae latents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LatentGroups(NamedTuple):
    """The (row, latent) pairs of a batch sorted by latent, made once and used for every weight gradient."""

    order_S: Tensor
    """Position of each sorted pair in the flattened [N, K] codes, int64."""
    rows_S: Tensor
    """Row of each sorted pair, int64."""
    starts_M: Tensor
    """Where each latent's pairs begin, int64."""


def group_by_latent(indices_NK: Tensor, d_sae: int) -> LatentGroups:
    """Sort the pairs of a batch by latent; stable, so that sums repeat bit for bit."""
    flat_S = indices_NK.reshape(-1)
    latents_S, order_S = torch.sort(flat_S.int(), stable=True)
    bounds_M = torch.arange(d_sae, device=flat_S.device, dtype=torch.int32)
    starts_M = torch.searchsorted(latents_S, bounds_M)
    return LatentGroups(order_S, order_S.div(indices_NK.shape[1], rounding_mode="floor"), starts_M)


def latent_sums(groups: LatentGroups, weights_NK: Tensor, table_ND: Tensor) -> Tensor:
    """``out[m] = sum over pairs (n, m) of weights[n, m] table[n]``, shape [M, D].

    Each latent is summed in row order by one worker: no atomics, no dense [N, M] matrix.
    """
    return F.embedding_bag(
        groups.rows_S,
        table_ND,
        groups.starts_M,
        per_sample_weights=weights_NK.reshape(-1)[groups.order_S],
        mode="sum",
    )
