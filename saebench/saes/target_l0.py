"""SAEs whose sparsity comes from a penalty, steered so that k latents of a token are active in the mean.

Shapes: N rows, D = d_in, M = d_sae latents, S entries kept, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from saebench.core.bounds import AtLeast
from saebench.core.codes import SparseCodes
from saebench.saes.aux_k import AuxKSAE, AuxSpec
from saebench.saes.base import INIT_ROWS, Batch, LossTerms
from saebench.saes.mutual_choice import just_below
from saebench_kernels import mutual_choice_encode, threshold_encode

INTEGRAL_GAIN = 0.05
PROPORTIONAL_GAIN = 1.0
AVERAGED_STEPS = 10
LARGEST_ERROR = 1.0
LARGEST_LOG = 60.0
"""Bound of the logarithm of the coefficient, for when no coefficient reaches k: e^60 still is a number."""

SLACKS = (0.0, *(0.05 * 2**i for i in range(12)))
"""How far below their thresholds calibration looks for entries, one after the other, until it has k N."""


@dataclass(frozen=True, kw_only=True)
class TargetL0Spec(AuxSpec):
    """Settings of the architectures whose k is reached by steering a penalty."""

    revival: Annotated[float, AtLeast(0)] = 0.02
    """Share of itself that the threshold of a dead latent loses with every step; 0 switches it off."""


class TargetL0SAE(AuxKSAE):
    """loss = |x - x_hat|^2 / d_in  +  coefficient * sparsity  +  aux_coefficient * AuxK,

    where the subclass says what sparsity is, and the coefficient follows the mean L0 of the batches:

        e = log(L0 / k),  log coefficient = I + P * (mean e of about 10 steps),  I += 0.05 e  after a step.

    To have mean L0 = k as a constraint, I is the multiplier of the method of multipliers (on a log scale, so
    that it stays positive) and P takes the place of the quadratic penalty: unlike a quadratic penalty alone
    it leaves no steady error. What is left at the end of training (the constraint moves on while the
    dictionary improves, and the mean over training rows is not that over others) is removed by `calibrate`,
    unless k is out of reach.

    Nothing has to warm up: thresholds begin where k latents of a token are active, and the coefficient
    where such thresholds are the best ones for orthogonal atoms.

    A latent that has died is silent on all rows, so that neither the loss nor AuxK, which goes through the
    ReLU, may reach it. Its threshold therefore decays until it fires again.
    """

    spec: TargetL0Spec
    threshold_gain: ClassVar[float] = 0.0
    """How much of e is added to the thresholds themselves after a step."""
    log_multiplier: Tensor
    """Scalar float32, the integral part I."""
    l0_error: Tensor
    """Scalar float32, running mean of e."""

    def __init__(self, spec: TargetL0Spec, d_in: int) -> None:
        super().__init__(spec, d_in)
        self.register_buffer("log_multiplier", torch.zeros(()))
        self.register_buffer("l0_error", torch.zeros(()))

    # What a subclass decides ----------------------------------------------------------------------

    def set_threshold(self, threshold: Tensor) -> None:
        """Begin with this threshold (a scalar, positive) for every latent, all other weights as they are."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its threshold is")

    def log_coefficient_of(self, threshold: Tensor) -> Tensor:
        """Log of the coefficient at which this threshold minimizes the loss of one latent alone."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its penalty is")

    def scale_codes(self, factor: float) -> None:
        """Multiply all codes by ``factor``, and nothing else."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its codes scale")

    def margins(self, x_ND: Tensor, slack: float) -> Tensor:
        """By how much entries exceed their thresholds, [C], of those that do so by more than -``slack``.

        In the unit that `raise_thresholds` takes, as is the slack, but for a factor that makes 1 a wide one.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its thresholds are")

    def raise_thresholds(self, amount: Tensor) -> None:
        """Subtract ``amount`` (a scalar) from all margins."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its thresholds are")

    def shrink_thresholds(self, share_M: Tensor) -> None:
        """Bring each latent's threshold nearer to 0 by this share of itself."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its thresholds are")

    # What all share -------------------------------------------------------------------------------

    def above(self, x_ND: Tensor, threshold: Tensor, bias_M: Tensor) -> SparseCodes:
        """Entries of ``W_enc (x - b_dec) + bias`` that are positive and above the threshold, no gradients."""
        with torch.no_grad():
            values_S, indices_S, offsets = threshold_encode(
                x_ND - self.b_dec, self.W_enc_MD, bias_M, threshold, scan_dtype=self.compute_dtype
            )
        return SparseCodes.from_ragged(values_S, indices_S, offsets, d_sae=self.d_sae)

    def pre_activation_std(self, x_ND: Tensor) -> Tensor:
        """About the standard deviation of pre-activations of these rows, a scalar."""
        norms_M: Tensor = torch.linalg.vector_norm(self.W_enc_MD, dim=1)
        return (x_ND - self.b_dec).std() * norms_M.mean()

    def coefficient(self) -> Tensor:
        """What multiplies the sparsity of the next batch, a scalar."""
        return (self.log_multiplier + PROPORTIONAL_GAIN * self.l0_error).exp()

    def steered_terms(
        self,
        batch: Batch,
        codes: SparseCodes,
        x_hat_ND: Tensor,
        objective: Tensor,
        sparsity: Tensor,
        **extra: Tensor,
    ) -> LossTerms:
        """``objective`` plus the penalty on ``sparsity`` and the auxiliary loss."""
        coefficient = self.coefficient()
        objective = objective + coefficient * sparsity
        return self.terms(batch, codes, x_hat_ND, objective, l0_coefficient=coefficient, **extra)

    @torch.no_grad()
    def after_step(self, batch: Batch, terms: LossTerms) -> None:
        super().after_step(batch, terms)
        l0 = (terms.codes.values != 0).sum() / terms.codes.n_rows
        error = (l0 / self.k).log().clamp(-LARGEST_ERROR, LARGEST_ERROR)
        self.raise_thresholds(self.threshold_gain * error)
        self.l0_error.lerp_(error, 1 / AVERAGED_STEPS)
        self.log_multiplier.add_(INTEGRAL_GAIN * error).clamp_(-LARGEST_LOG, LARGEST_LOG)
        dead_M = self.tokens_since_fired >= self.dead_after
        self.shrink_thresholds(dead_M * min(1.0, self.spec.revival))

    @torch.no_grad()
    def calibrate(self, x_ND: Tensor) -> float:
        """Move all thresholds together, until k N entries of these N rows are active; returns the mean L0.

        Where no more than k N entries could be active (a gated or JumpReLU latent needs a positive
        pre-activation, and no threshold reaches all entries), thresholds stay where training has left them.
        """
        wanted = self.k * x_ND.shape[0]
        for slack in SLACKS:
            margins_C = self.margins(x_ND, slack)
            if margins_C.numel() > wanted:
                break
        amount = margins_C.new_zeros(())
        if margins_C.numel() > wanted:
            amount = margins_C.kthvalue(margins_C.numel() - wanted).values
            self.raise_thresholds(amount)
        return int((margins_C > amount).sum()) / x_ND.shape[0]

    @torch.no_grad()
    def initialize(self, sample: Batch, *, seed: int) -> None:
        """As in every SAE, and one threshold for all latents with which k of a row are active."""
        generator = torch.Generator().manual_seed(seed)
        self.W_dec.copy_(torch.randn(self.d_sae, self.d_in, generator=generator))
        self.normalize_decoder()
        self.W_enc_MD.copy_(self.W_dec)
        self.b_dec.copy_(sample.x_ND.double().mean(0))
        probe = sample[:INIT_ROWS]
        centered_ND = probe.x_ND - self.b_dec
        values_S, _, _ = mutual_choice_encode(
            centered_ND,
            self.W_enc_MD,
            torch.zeros_like(self.b_enc),
            self.k * len(centered_ND),
            torch.zeros_like(centered_ND[0, 0]),
            scan_dtype=self.compute_dtype,
        )
        threshold = just_below(values_S.min()).clamp_min(torch.finfo(torch.float32).tiny)
        self.set_threshold(threshold)
        self.log_multiplier.copy_(self.log_coefficient_of(threshold))
        offset_ND = centered_ND.double() - self.loss(probe).error.double()
        energy = offset_ND.square().sum()
        if energy > 0:
            self.scale_codes(float((centered_ND.double() * offset_ND).sum() / energy))
