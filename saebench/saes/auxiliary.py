"""AuxK: the loss that gives latents which have stopped firing a gradient (Gao et al. 2024, section A.2).

Shapes: N rows, D = d_in, A candidate latents, K kept a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from saebench.core.bounds import AtLeast
from saebench.saes.base import SAE
from saebench.saes.spec import SaeSpec


@dataclass(frozen=True, kw_only=True)
class AuxSpec(SaeSpec):
    """Settings of the architectures that revive dead latents with AuxK."""

    k_aux: Annotated[int | None, AtLeast(1)] = None
    """Dead latents that AuxK picks for each token; d_in / 2 by default."""
    aux_coefficient: Annotated[float, AtLeast(0)] = 1 / 32
    """Weight of the AuxK loss; 0 switches it off."""
    dead_tokens: Annotated[int, AtLeast(1)] = 10_000_000
    """A latent is dead when it has not fired for this many tokens, or for 10% of the run if that is less."""


def aux_k(
    sae: SAE,
    x_ND: Tensor,
    error_ND: Tensor,
    candidates_A: Tensor,
    *,
    k_aux: int | None,
    weights_A: Tensor | None = None,
) -> Tensor:
    """How much of the (detached) residual ``error`` the candidate latents leave unexplained, a scalar.

    The ``k_aux`` (d_in / 2 by default) largest relu pre-activations among the candidates are decoded
    without bias to e_hat, each times its latent's ``weights`` when given, and

        AuxK = sum |e - e_hat|^2 / sum |e - mean e|^2.

    Its gradient reaches the candidates' encoder and decoder rows and nothing else: x - b_dec is detached.
    It is 0 without candidates, and when the residual does not vary (a single row, a perfect
    reconstruction).
    """
    if candidates_A.numel() == 0:
        return x_ND.new_zeros(())
    centered_ND = (x_ND - sae.b_dec).detach()
    pre_NA = torch.relu(torch.addmm(sae.b_enc[candidates_A], centered_ND, sae.W_enc_MD[candidates_A].T))
    k_aux = default_k_aux(sae, k_aux)
    if k_aux < candidates_A.numel():
        values_NK, slots_NK = pre_NA.topk(k_aux, dim=1, sorted=False)
        pre_NA = torch.zeros_like(pre_NA).scatter(1, slots_NK, values_NK)
    if weights_A is not None:
        pre_NA = pre_NA * weights_A
    return share_left(error_ND, pre_NA @ sae.W_dec[candidates_A])


def default_k_aux(sae: SAE, k_aux: int | None) -> int:
    """How many dead latents AuxK picks for each token."""
    return k_aux or max(1, sae.d_in // 2)


def share_left(error_ND: Tensor, e_hat_ND: Tensor) -> Tensor:
    """``sum |e - e_hat|^2 / sum |e - mean e|^2``, e detached; 0 when e does not vary."""
    error_ND = error_ND.detach()
    variance = (error_ND - error_ND.mean(0)).square().sum()
    # Infinity, not a quotient mended afterwards: its gradient would be 0 / 0.
    variance = torch.where(variance > torch.finfo(torch.float32).tiny, variance, torch.inf)
    return (error_ND - e_hat_ND).square().sum() / variance
