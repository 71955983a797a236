"""TopK SAE with AuxK (Gao et al. 2024, arXiv 2406.04093).

Shapes: N rows, D = d_in, M = d_sae latents, K kept a row, A dead latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.config import SaeSpec
from saebench.fields import at_least
from saebench.saes.base import SAE, LossTerms
from saebench.saes.functions import TopKEncode, decode_codes


@dataclass(frozen=True, kw_only=True)
class TopKSpec(SaeSpec):
    """Settings of a TopK SAE."""

    name: ClassVar[str] = "topk"

    k_aux: int | None = None
    """Dead latents that AuxK picks for each token; d_in / 2 by default."""
    aux_coefficient: float = 1 / 32
    """Weight of the AuxK loss; 0 switches it off."""
    dead_tokens: int = 10_000_000
    """A latent is dead when it has not fired for this many tokens, or for 10% of the run if that is less."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, aux_coefficient=0, dead_tokens=1)
        if self.k_aux is not None:
            at_least(self, k_aux=1)


class TopKSAE(SAE):
    """Keeps the k largest pre-activations of each token, after a ReLU.

    z = top_k(relu(W_enc (x - b_dec) + b_enc)),  x_hat = W_dec^T z + b_dec,
    loss = |x - x_hat|^2 / d_in  +  aux_coefficient * AuxK.
    """

    Spec = TopKSpec
    spec: TopKSpec

    def encode_rows(self, x_ND: Tensor) -> SparseCodes:
        values_NK, indices_NK = TopKEncode.apply(  # type: ignore[no-untyped-call]
            x_ND, self.W_enc_MD, self.b_enc, self.b_dec, self.k, self.compute_dtype
        )
        return SparseCodes.from_topk(values_NK, indices_NK, d_sae=self.d_sae)

    def loss(self, x_ND: Tensor) -> LossTerms:
        codes = self.encode_rows(x_ND)
        x_hat_ND = decode_codes(codes, self.W_dec, self.b_dec)
        error_ND = x_ND - x_hat_ND
        reconstruction = error_ND.square().mean()
        auxiliary = self.auxiliary_loss(x_ND, error_ND.detach())
        total = reconstruction + self.spec.aux_coefficient * auxiliary
        return LossTerms(total, reconstruction.detach(), auxiliary.detach(), codes, x_hat_ND.detach())

    def auxiliary_loss(self, x_ND: Tensor, error_ND: Tensor) -> Tensor:
        """AuxK: how much of the (detached) residual the dead latents leave unexplained.

        The k_aux largest pre-activations among dead latents are decoded without bias to e_hat, and
        AuxK = sum |e - e_hat|^2 / sum |e - mean e|^2. Its gradient reaches the dead latents' encoder and
        decoder rows and nothing else: x - b_dec is detached. It is 0 without dead latents, and when the
        residual does not vary (a single row, a perfect reconstruction).
        """
        if self.spec.aux_coefficient == 0:
            return x_ND.new_zeros(())
        dead_A = self.dead_latents()
        if dead_A.numel() == 0:
            return x_ND.new_zeros(())
        centred_ND = (x_ND - self.b_dec).detach()
        pre_NA = torch.relu(torch.addmm(self.b_enc[dead_A], centred_ND, self.W_enc_MD[dead_A].T))
        k_aux = self.spec.k_aux or max(1, self.d_in // 2)
        if k_aux < dead_A.numel():
            values_NK, slots_NK = pre_NA.topk(k_aux, dim=1, sorted=False)
            pre_NA = torch.zeros_like(pre_NA).scatter(1, slots_NK, values_NK)
        e_hat_ND = pre_NA @ self.W_dec[dead_A]
        variance = (error_ND - error_ND.mean(0)).square().sum()
        # Infinity, not a quotient mended afterwards: its gradient would be 0 / 0.
        variance = torch.where(variance > torch.finfo(torch.float32).tiny, variance, torch.inf)
        return (error_ND - e_hat_ND).square().sum() / variance
