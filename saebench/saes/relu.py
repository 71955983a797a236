"""ReLU SAE with an L1 penalty (Cunningham et al. 2023, arXiv 2309.08600; Bricken et al. 2023).

Shapes: N rows, D = d_in, M = d_sae latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saebench.core.codes import SparseCodes
from saebench.saes.base import Batch, LossTerms
from saebench.saes.target_l0 import TargetL0SAE, TargetL0Spec


@dataclass(frozen=True, kw_only=True)
class ReluSpec(TargetL0Spec):
    """Settings of a ReLU SAE."""

    name: ClassVar[str] = "relu"


class ReluSAE(TargetL0SAE):
    """z = relu(W_enc (x - b_dec) + b_enc),  x_hat = W_dec^T z + b_dec,

    loss = |x - x_hat|^2 / d_in  +  coefficient * sum_i z_i |d_i|  +  aux_coefficient * AuxK.

    Atoms d_i keep norm 1, so the penalty is the sum of the codes. The coefficient is adjusted to a mean L0 of
    k (see `TargetL0SAE`). A latent's threshold is -b_enc, so calibration adds one number to b_enc, and with
    it to every active code.
    """

    Spec = ReluSpec
    spec: ReluSpec

    def encode_rows(self, x_ND: Tensor) -> SparseCodes:
        """Codes of rows [N, D]: every positive pre-activation."""
        active = self.above(x_ND, self.b_enc.new_zeros(()), self.b_enc)
        return self.attach_gradients(x_ND, active)

    def loss(self, batch: Batch) -> LossTerms:
        codes = self.encode_rows(batch.x_ND)
        x_hat_ND = self.decode(codes, batch.x_ND)
        objective = (batch.y_NE - x_hat_ND).square().mean()
        return self.steered_terms(batch, codes, x_hat_ND, objective, codes.values.sum() / codes.n_rows)

    def set_threshold(self, threshold: Tensor) -> None:
        self.b_enc.fill_(-threshold)

    def log_coefficient_of(self, threshold: Tensor) -> Tensor:
        """min over z of (a - z)^2 / d_out + c z is at z = a - c d_out / 2."""
        return threshold.log() + math.log(2 / self.d_out)

    def scale_codes(self, factor: float) -> None:
        self.W_enc_MD.mul_(factor)
        self.b_enc.mul_(factor)

    def margins(self, x_ND: Tensor, slack: float) -> Tensor:
        lift = slack * self.pre_activation_std(x_ND)
        return self.above(x_ND, torch.zeros_like(lift), self.b_enc + lift).values - lift

    def raise_thresholds(self, amount: Tensor) -> None:
        self.b_enc.sub_(amount)

    def shrink_thresholds(self, share_M: Tensor) -> None:
        self.b_enc.sub_(self.b_enc.clamp_max(0) * share_M)
