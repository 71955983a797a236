"""JumpReLU SAE (Rajamanoharan et al. 2024, arXiv 2407.14435).

Shapes: N rows, S entries of all rows end to end, D = d_in, M = d_sae latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from saebench.core.bounds import Above, AtMost
from saebench.core.codes import SparseCodes
from saebench.saes.base import Batch, LossTerms
from saebench.saes.target_l0 import TargetL0SAE, TargetL0Spec
from saebench_kernels import gather_latents, jump_relu

THRESHOLD_RATE = 10.0
"""Learning rate of thresholds, on a logarithmic scale, relative to that of weights."""
SMALLEST_THRESHOLD = 1e-30
"""Thresholds are kept above this: a threshold of 0 could not grow again."""


@dataclass(frozen=True, kw_only=True)
class JumpReluSpec(TargetL0Spec):
    """Settings of a JumpReLU SAE."""

    name: ClassVar[str] = "jumprelu"

    bandwidth: Annotated[float, Above(0), AtMost(2)] = 0.5
    """Width of the window around a threshold whose pre-activations move it, as a share of the threshold."""


class JumpReluSAE(TargetL0SAE):
    """z = pre * H(pre - threshold),  pre = relu(W_enc (x - b_dec) + b_enc),  x_hat = W_dec^T z + b_dec,

    loss = |x - x_hat|^2 / d_in  +  coefficient * sum_i H(pre_i - threshold_i)  +  aux_coefficient * AuxK,

    H the step function. The coefficient is adjusted to a mean L0 of k (see `TargetL0SAE`).

    A step has no gradient, so thresholds theta get the paper's pseudo-derivatives, with K the rectangle of
    width and height 1 around 0 and eps the bandwidth:

        dz / dtheta = -(theta / eps) K((pre - theta) / eps),
        dH / dtheta = -(1 / eps) K((pre - theta) / eps);

    pre-activations get dz / dpre = H(pre - theta) and dH / dpre = 0. Here eps is ``bandwidth * theta``, not
    one number for all latents and units. A pre-activation that the ReLU cut moves no threshold.

    Adam moves a parameter by about the learning rate, however small the gradient. A threshold is of the size
    of an activation, so it would hardly move, and its logarithm would move too slowly for the encoder. So the
    parameter is ``log_step``, which is 0 before every step, and after it

        threshold <- threshold * exp(10 log_step),  log_step <- 0,

    which trains log(threshold) at ten times the learning rate, while ``threshold`` stays the threshold
    itself. The penalty acts on thresholds only, and Adam keeps them slow for long after their gradient was
    large, so a coefficient alone would overshoot. After every step all thresholds are therefore also
    multiplied by (L0 / k)^0.05, which is 1 once the coefficient is right. Calibration multiplies them by one
    factor, too.
    """

    Spec = JumpReluSpec
    spec: JumpReluSpec
    threshold_gain = 0.05
    weight_names = (*TargetL0SAE.weight_names, "threshold")
    threshold: Tensor
    """[M] float32: a pre-activation above it is active."""

    def __init__(self, spec: JumpReluSpec, d_in: int) -> None:
        super().__init__(spec, d_in)
        self.register_buffer("threshold", torch.zeros(spec.d_sae))
        self.log_step = nn.Parameter(torch.zeros(spec.d_sae))

    def encode_rows(self, x_ND: Tensor) -> SparseCodes:
        """Codes of rows [N, D]: every pre-activation above its threshold."""
        return self.attach_gradients(x_ND, self.above(x_ND, self.threshold, self.b_enc))

    def loss(self, batch: Batch) -> LossTerms:
        bandwidth = self.spec.bandwidth
        near = self.above(batch.x_ND, self.threshold * (1 - bandwidth / 2), self.b_enc)
        pre_S = self.attach_gradients(batch.x_ND, near).values
        threshold_S = gather_latents(self.threshold * self.log_step.exp(), near.entries)
        z_S, active_S = jump_relu(pre_S, threshold_S, bandwidth)
        codes = near.with_values(z_S)
        x_hat_ND = self.decode(codes, batch.x_ND)
        objective = (batch.y_NE - x_hat_ND).square().mean()
        return self.steered_terms(batch, codes, x_hat_ND, objective, active_S.sum() / codes.n_rows)

    @torch.no_grad()
    def after_step(self, batch: Batch, terms: LossTerms) -> None:
        self.threshold.mul_((THRESHOLD_RATE * self.log_step).exp())
        self.log_step.zero_()
        super().after_step(batch, terms)
        self.threshold.clamp_(SMALLEST_THRESHOLD, 1 / SMALLEST_THRESHOLD)

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        """As for every SAE; thresholds are compared with codes, so they are divided by ``scale``, too."""
        super().fold_scale(scale)
        self.threshold.div_(scale)

    def set_threshold(self, threshold: Tensor) -> None:
        self.b_enc.zero_()
        self.threshold.copy_(threshold)

    def log_coefficient_of(self, threshold: Tensor) -> Tensor:
        """(a - z)^2 / d_out + c H(z) is smaller at z = a than at z = 0 when a^2 > c d_out."""
        return 2 * threshold.log() - math.log(self.d_out)

    def scale_codes(self, factor: float) -> None:
        self.W_enc_MD.mul_(factor)
        self.b_enc.mul_(factor)
        self.threshold.mul_(factor)

    def margins(self, x_ND: Tensor, slack: float) -> Tensor:
        """Logarithms of pre-activations over thresholds."""
        near = self.above(x_ND, self.threshold * math.exp(-slack), self.b_enc)
        return near.values.log() - self.threshold.log()[near.indices]

    def raise_thresholds(self, amount: Tensor) -> None:
        self.threshold.mul_(amount.exp())

    def shrink_thresholds(self, share_M: Tensor) -> None:
        self.threshold.sub_(self.threshold * share_M)
