"""TopK SAE with AuxK, Multi-TopK and a schedule of k (Gao et al. 2024, arXiv 2406.04093).

Shapes: N rows, D = d_in, K kept per row.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from saebench.core.bounds import AtLeast, AtMost
from saebench.core.codes import SparseCodes
from saebench.core.errors import UserError
from saebench.saes.aux_k import AuxKSAE, AuxSpec
from saebench.saes.base import Batch, LossTerms
from saebench_kernels import topk_encode

MULTI_FACTOR = 4
MULTI_COEFFICIENT = 1 / 8


@dataclass(frozen=True, kw_only=True)
class TopKSpec(AuxSpec):
    """Settings of a TopK SAE."""

    name: ClassVar[str] = "topk"

    multi_topk: bool = False
    """Also reconstruct from the 4 k largest, with weight 1/8, so that the SAE can be used with other k."""
    k_start: int | None = None
    """Begin training with this k and lower it linearly to k; by default k from the start."""
    k_anneal: Annotated[float, AtLeast(0), AtMost(1)] = 0.2
    """Fraction of the run during which k falls from k_start to k."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k_start is not None and not self.k <= self.k_start <= self.d_sae:
            raise UserError(
                f"k_start is {self.k_start}; k falls from it, so it must be between k = {self.k} and "
                f"d_sae = {self.d_sae}"
            )


class TopKSAE(AuxKSAE):
    """Keeps the k largest pre-activations of each token, after a ReLU.

    z = top_k(relu(W_enc (x - b_dec) + b_enc)),  x_hat = W_dec^T z + b_dec,
    loss = |x - x_hat|^2 / d_in  [ + |x - x_hat(4k)|^2 / (8 d_in) ]  +  aux_coefficient * AuxK.
    """

    Spec = TopKSpec
    spec: TopKSpec

    def encode_rows(self, x_ND: Tensor, *, k: int | None = None) -> SparseCodes:
        """Codes of rows [N, D]; ``k`` other than the one trained for keeps more latents, or fewer."""
        chosen = self.top(self.centered(x_ND), self.k if k is None else k)
        return self.attach_gradients(x_ND, chosen)

    def choose(self, batch: Batch) -> SparseCodes:
        return self.top(self.centered_rows(batch), self.k_at(batch.progress))

    def loss(self, batch: Batch) -> LossTerms:
        if not self.spec.multi_topk:
            return super().loss(batch)
        k = self.k_at(batch.progress)
        with torch.no_grad():
            chosen = self.top(self.centered(batch.x_ND), min(MULTI_FACTOR * k, self.d_sae))
        many = self.attach_gradients(batch.x_ND, chosen)
        indices_NK, values_NK = many.rectangular()
        slots_NK = values_NK.detach().topk(k, dim=1, sorted=False).indices
        codes = SparseCodes.from_topk(
            values_NK.gather(1, slots_NK), indices_NK.gather(1, slots_NK), d_sae=self.d_sae
        )
        x_hat_ND = self.decode(codes, batch.x_ND)
        of_many_ND = self.decode(many, batch.x_ND)
        objective = (batch.y_NE - x_hat_ND).square().mean()
        objective = objective + MULTI_COEFFICIENT * (batch.y_NE - of_many_ND).square().mean()
        return self.terms(batch, codes, x_hat_ND, objective)

    def graph_key(self, progress: float) -> Hashable | None:
        if self.spec.multi_topk or not self.is_fused:
            return None
        return self.k_at(progress), self.n_candidates

    def k_at(self, progress: float) -> int:
        """k at this fraction of the run."""
        if self.spec.k_start is None or progress >= self.spec.k_anneal:
            return self.k
        done = progress / self.spec.k_anneal
        return round(self.spec.k_start + (self.k - self.spec.k_start) * done)

    def top(self, centered_ND: Tensor, k: int) -> SparseCodes:
        """The k largest entries of each row of x - b_dec, without gradients.

        Raises:
            ValueError: k is not between 1 and d_sae.
        """
        if not 1 <= k <= self.d_sae:
            raise ValueError(f"k is {k}; it must be between 1 and d_sae = {self.d_sae}")
        with torch.no_grad():
            values_NK, indices_NK = topk_encode(
                centered_ND, self.W_enc_MD, self.b_enc, k, scan_dtype=self.compute_dtype
            )
        return SparseCodes.from_topk(values_NK, indices_NK, d_sae=self.d_sae)
