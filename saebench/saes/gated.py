"""Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014).

Shapes: N rows, S entries of all rows end to end, D = d_in, M = d_sae latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from saebench.core.codes import SparseCodes
from saebench.saes.base import Batch, LossTerms
from saebench.saes.target_l0 import TargetL0SAE, TargetL0Spec
from saebench_kernels import gather_latents, sparse_decode, sparse_encode


@dataclass(frozen=True, kw_only=True)
class GatedSpec(TargetL0Spec):
    """Settings of a gated SAE."""

    name: ClassVar[str] = "gated"


class GatedSAE(TargetL0SAE):
    """A gate decides which latents are active, a magnitude how strongly; both share the encoder matrix:

        gate = W_enc (x - b_dec) + b_gate,   magnitude = exp(r_mag) * W_enc (x - b_dec) + b_mag,
        z = 1[gate > 0] * relu(magnitude),   x_hat = W_dec^T z + b_dec,

    loss = |x - x_hat|^2 / d_in  +  coefficient * sum_i relu(gate_i)
           +  |x - x_hat_gate|^2 / d_in  +  aux_coefficient * AuxK,

    where x_hat_gate = W_dec^T relu(gate) + b_dec, with W_dec and b_dec held fixed, trains the gate, since the
    step 1[gate > 0] has no gradient. The coefficient is adjusted to a mean L0 of k (see `TargetL0SAE`).
    ``b_enc`` is the bias of the gate; calibration adds one number to it, which opens or closes gates and
    changes no magnitude.
    """

    Spec = GatedSpec
    spec: GatedSpec
    weight_names = ("W_enc_MD", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")

    def __init__(self, spec: GatedSpec, d_in: int) -> None:
        super().__init__(spec, d_in)
        self.b_gate = nn.Parameter(torch.zeros(spec.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(spec.d_sae))
        self.r_mag = nn.Parameter(torch.zeros(spec.d_sae))

    @property
    def b_enc(self) -> Tensor:  # type: ignore[override]
        return self.b_gate

    def encode_rows(self, x_ND: Tensor) -> SparseCodes:
        """Codes of rows [N, D]: the magnitudes where gates are open."""
        gates = self.open_gates(x_ND)
        return gates.with_values(self.magnitudes(gates, self.shared(x_ND, gates)))

    def loss(self, batch: Batch) -> LossTerms:
        x_ND, y_NE = batch.x_ND, batch.y_NE
        gates = self.open_gates(x_ND)
        shared_S = self.shared(x_ND, gates)
        codes = gates.with_values(self.magnitudes(gates, shared_S))
        gate_S = shared_S + gather_latents(self.b_gate - self.b_gate.detach(), gates.entries)
        x_hat_ND = self.decode(codes, x_ND)
        by_gate_ND = sparse_decode(gate_S, gates.entries, self.W_dec.detach(), self.b_dec.detach())
        if self.spec.skip:
            by_gate_ND = by_gate_ND + self.skipped(x_ND).detach()
        of_gate = (y_NE - by_gate_ND).square().mean()
        objective = (y_NE - x_hat_ND).square().mean() + of_gate
        return self.steered_terms(
            batch,
            codes,
            x_hat_ND,
            objective,
            gate_S.sum() / gates.n_rows,
            gate_reconstruction=of_gate.detach(),
        )

    def open_gates(self, x_ND: Tensor, lift: Tensor | float = 0.0) -> SparseCodes:
        """Entries with gate + lift > 0, the sum as value, without gradients."""
        return self.above(x_ND, self.b_gate.new_zeros(()), self.b_gate + lift)

    def shared(self, x_ND: Tensor, gates: SparseCodes) -> Tensor:
        """[S] gate of every entry, with gradients for W_enc and the input's bias but none for b_gate.

        The magnitude is computed from it too, by subtracting b_gate, and must not train b_gate.
        """
        b_gate_M = self.b_gate.detach()
        return sparse_encode(gates.values, gates.entries, x_ND, self.W_enc_MD, b_gate_M, self.input_bias)

    def magnitudes(self, gates: SparseCodes, shared_S: Tensor) -> Tensor:
        """[S] relu(magnitude) of every entry."""
        dots_S = shared_S - self.b_gate.detach()[gates.indices]
        factor_S = gather_latents(self.r_mag.exp(), gates.entries)
        return torch.relu(factor_S * dots_S + gather_latents(self.b_mag, gates.entries))

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        """As for every SAE; r_mag has no unit and does not change."""
        super().fold_scale(scale)
        self.b_mag.div_(scale)

    def set_threshold(self, threshold: Tensor) -> None:
        self.b_gate.fill_(-threshold)
        self.b_mag.zero_()
        self.r_mag.zero_()

    def log_coefficient_of(self, threshold: Tensor) -> Tensor:
        """For the gate alone: min over z of (a - z)^2 / d_out + c z is at z = a - c d_out / 2."""
        return threshold.log() + math.log(2 / self.d_out)

    def scale_codes(self, factor: float) -> None:
        self.W_enc_MD.mul_(factor)
        self.b_gate.mul_(factor)
        self.b_mag.mul_(factor)

    def margins(self, x_ND: Tensor, slack: float) -> Tensor:
        lift = slack * self.pre_activation_std(x_ND)
        gates = self.open_gates(x_ND, lift)
        gate_S = gates.values - lift
        return gate_S[self.magnitudes(gates, gate_S) > 0]

    def raise_thresholds(self, amount: Tensor) -> None:
        self.b_gate.sub_(amount)

    def shrink_thresholds(self, share_M: Tensor) -> None:
        self.b_gate.sub_(self.b_gate.clamp_max(0) * share_M)
