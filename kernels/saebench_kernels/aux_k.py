"""AuxK, the loss that gives latents which have stopped firing a gradient (Gao et al. 2024, section A.2).

Shapes: N rows, D = d_in, M = d_sae latents, A candidate latents, K kept per row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AuxCandidates(NamedTuple):
    """The latents that AuxK may use."""

    latents_A: Tensor
    """int64; in a list of fixed length, unused slots repeat latent 0."""
    weights_A: Tensor
    """float32: 0 in a slot that is unused or whose latent is not to be revived, otherwise the factor of the
    latent's values."""
    k_aux: int
    """Candidates picked per row."""
    weighted: bool = False
    """Whether there are weights other than 0 and 1."""


def aux_k(
    x_ND: Tensor,
    error_ND: Tensor,
    candidates: AuxCandidates | None,
    W_enc_MD: Tensor,
    b_enc_M: Tensor,
    W_dec_MD: Tensor,
    b_in_D: Tensor,
) -> Tensor:
    """How much of the (detached) residual ``error`` the candidate latents leave unexplained, a scalar.

    The ``k_aux`` largest relu pre-activations of each row among the candidates are decoded without bias to
    e_hat, each times its latent's weight, and

        AuxK = sum |e - e_hat|^2 / sum |e - mean e|^2.

    Pre-activations are those of x - b_in (b_in is the b_dec of an SAE). The gradient reaches the candidates'
    encoder and decoder rows and nothing else: x - b_in is detached. It is 0 without candidates, and when the
    residual does not vary (a single row, a perfect reconstruction).
    """
    if candidates is None:
        return x_ND.new_zeros(())
    latents_A, weights_A, k_aux, weighted = candidates
    centered_ND = (x_ND - b_in_D).detach()
    b_enc_A = torch.where(weights_A > 0, b_enc_M[latents_A], -torch.inf)
    pre_NA = torch.relu(torch.addmm(b_enc_A, centered_ND, W_enc_MD[latents_A].T))
    if k_aux < len(latents_A):
        values_NK, slots_NK = pre_NA.topk(k_aux, dim=1, sorted=False)
        pre_NA = torch.zeros_like(pre_NA).scatter(1, slots_NK, values_NK)
    if weighted:
        pre_NA = pre_NA * weights_A
    left = (error_ND - pre_NA @ W_dec_MD[latents_A]).square().sum()
    return torch.where((weights_A > 0).any(), left / residual_variance(error_ND), 0.0)


def residual_variance(error_ND: Tensor) -> Tensor:
    """``sum |e - mean e|^2``, a scalar; infinity when e does not vary.

    Infinity makes a quotient 0. Replacing the quotient afterwards would leave 0 / 0 in its gradient.
    """
    variance = (error_ND - error_ND.mean(0)).square().sum()
    return torch.where(variance > torch.finfo(torch.float32).tiny, variance, torch.inf)
