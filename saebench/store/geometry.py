"""Directions of the latents: norms, cosines of encoder and decoder, nearest neighbors.

Shapes: M = d_sae latents, D = d_in, E = d_out, B latents of a block, J neighbors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from saebench.store.schema import NEIGHBOR_KINDS, NEIGHBORS_PER_FEATURE

BLOCK_BYTES = 1 << 27


@torch.no_grad()
def directions(W_enc_MD: Tensor, W_dec_ME: Tensor) -> dict[str, Any]:
    """dec_norm, enc_norm and enc_dec_cos of every latent; the cosine with a zero row is 0.

    A transcoder whose input and target have different widths has no enc_dec_cos.
    """
    norms = {
        "dec_norm": W_dec_ME.float().norm(dim=1).cpu().numpy(),
        "enc_norm": W_enc_MD.float().norm(dim=1).cpu().numpy(),
    }
    if W_enc_MD.shape != W_dec_ME.shape:
        return norms
    decoder, encoder = _unit(W_dec_ME.float()), _unit(W_enc_MD.float())
    return {**norms, "enc_dec_cos": (decoder * encoder).sum(1).clamp(-1, 1).cpu().numpy()}


@torch.no_grad()
def nearest_rows(
    W_MD: Tensor, n: int = NEIGHBORS_PER_FEATURE, *, of: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(other, cosine)`` [M, J] on the CPU: the J = min(n, M - 1) other rows with the largest cosine,
    nearest first.

    With ``of``, only those of the latents numbered there. Computed in blocks of rows, so memory stays at
    ``BLOCK_BYTES`` for any M.
    """
    unit_MD = _unit(W_MD.float())
    n_latents = len(unit_MD)
    n = min(n, n_latents - 1)
    block = max(1, BLOCK_BYTES // (4 * n_latents))
    others, cosines = [torch.empty(0, n, dtype=torch.int64)], [torch.empty(0, n)]
    wanted = torch.arange(n_latents) if of is None else of
    for start in range(0, len(wanted), block):
        rows = wanted[start : start + block].to(unit_MD.device)
        cosine_BM = unit_MD[rows] @ unit_MD.T
        cosine_BM[torch.arange(len(rows), device=rows.device), rows] = -torch.inf
        cosine_BJ, other_BJ = cosine_BM.topk(n, dim=1)
        others.append(other_BJ.cpu())
        cosines.append(cosine_BJ.clamp(-1, 1).cpu())
    return torch.cat(others), torch.cat(cosines)


def neighbor_rows(kind: str, other_MJ: Tensor, cosine_MJ: Tensor) -> dict[str, Any]:
    """Rows of the neighbor table, of one of the NEIGHBOR_KINDS that are cosines."""
    import pyarrow

    n_latents, n = other_MJ.shape
    return {
        "feature": np.repeat(np.arange(n_latents), n),
        "kind": np.full(n_latents * n, NEIGHBOR_KINDS[kind]),
        "rank": np.tile(np.arange(n), n_latents),
        "other": other_MJ.reshape(-1).numpy(),
        "score": cosine_MJ.reshape(-1).numpy(),
        "n_both": pyarrow.nulls(n_latents * n, pyarrow.uint32()),
    }


def _unit(W_MD: Tensor) -> Tensor:
    unit_MD: Tensor = W_MD / W_MD.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return unit_MD
