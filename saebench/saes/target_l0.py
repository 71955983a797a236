"""Base class of SAEs with a sparsity penalty that is adjusted so that the mean L0 is k.

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
"""Bound of the logarithm of the coefficient, for when no coefficient reaches k: e^60 is still finite."""

SLACKS = (0.0, *(0.05 * 2**i for i in range(12)))
"""How far below their thresholds calibration searches for entries: in this order, until it has k N."""


@dataclass(frozen=True, kw_only=True)
class TargetL0Spec(AuxSpec):
    """Settings of the architectures that reach k by adjusting a penalty."""

    revival: Annotated[float, AtLeast(0)] = 0.02
    """Share of itself that the threshold of a dead latent loses with every step; 0 switches it off."""


class TargetL0SAE(AuxKSAE):
    """loss = |x - x_hat|^2 / d_in  +  coefficient * sparsity  +  aux_coefficient * AuxK,

    where the subclass defines the sparsity, and the coefficient follows the mean L0 of the batches:

        e = log(L0 / k),  log coefficient = I + P * (mean e of about 10 steps),  I += 0.05 e  after a step.

    This is the method of multipliers for the constraint mean L0 = k. I is the multiplier, on a log scale so
    that it stays positive, and P takes the place of the quadratic penalty; a quadratic penalty alone would
    leave a constant error. The error at the end of training (the constraint moves while the dictionary
    improves, and the mean L0 of training rows differs from that of others) is removed by `calibrate`, unless
    k is out of reach.

    No warm-up is needed: thresholds start where k latents per token are active, and the coefficient starts
    where such thresholds are optimal for orthogonal atoms.

    A dead latent is inactive on all rows, so that neither the loss nor AuxK, which goes through the ReLU, may
    reach it. Its threshold therefore decays until it fires again.
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

    # What a subclass defines ----------------------------------------------------------------------

    def set_threshold(self, threshold: Tensor) -> None:
        """Give every latent this threshold (a scalar, positive); other weights do not change."""
        raise NotImplementedError(f"{type(self).__name__} does not define set_threshold")

    def log_coefficient_of(self, threshold: Tensor) -> Tensor:
        """Log of the coefficient at which this threshold minimizes the loss of a single latent."""
        raise NotImplementedError(f"{type(self).__name__} does not define log_coefficient_of")

    def scale_codes(self, factor: float) -> None:
        """Multiply all codes by ``factor``; which latents are active does not change."""
        raise NotImplementedError(f"{type(self).__name__} does not define scale_codes")

    def margins(self, x_ND: Tensor, slack: float) -> Tensor:
        """How much entries exceed their thresholds, [C], for those that exceed them by more than -``slack``.

        In the unit of `raise_thresholds`; the slack is in the same unit, up to a factor that makes 1 large.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define margins")

    def raise_thresholds(self, amount: Tensor) -> None:
        """Subtract ``amount`` (a scalar) from all margins."""
        raise NotImplementedError(f"{type(self).__name__} does not define raise_thresholds")

    def shrink_thresholds(self, share_M: Tensor) -> None:
        """Reduce each latent's threshold by this share of itself."""
        raise NotImplementedError(f"{type(self).__name__} does not define shrink_thresholds")

    # What all subclasses share
    # -------------------------------------------------------------------------------

    def above(self, x_ND: Tensor, threshold: Tensor, bias_M: Tensor) -> SparseCodes:
        """Entries of ``W_enc (x - b_dec) + bias`` that are positive and above the threshold, no gradients."""
        with torch.no_grad():
            values_S, indices_S, offsets = threshold_encode(
                x_ND - self.input_bias, self.W_enc_MD, bias_M, threshold, scan_dtype=self.compute_dtype
            )
        return SparseCodes.from_ragged(values_S, indices_S, offsets, d_sae=self.d_sae)

    def pre_activation_std(self, x_ND: Tensor) -> Tensor:
        """The approximate standard deviation of the pre-activations of these rows, a scalar."""
        norms_M: Tensor = torch.linalg.vector_norm(self.W_enc_MD, dim=1)
        return (x_ND - self.input_bias).std() * norms_M.mean()

    def coefficient(self) -> Tensor:
        """The coefficient of the sparsity in the next batch, a scalar."""
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
        """Move all thresholds by one amount so that k N entries of these N rows are active; returns the mean
        L0.

        Where at most k N entries can be active (a gated or JumpReLU latent needs a positive pre-activation,
        whatever its threshold), the thresholds do not change.
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
        """As for every SAE, and one threshold for all latents, at which k per row are active."""
        self.initialize_dictionary(sample, seed=seed)
        probe = sample[:INIT_ROWS]
        centered_ND = probe.x_ND - self.input_bias
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
        error_NE = (probe.y_NE - self.b_dec).double()
        offset_NE = error_NE - self.loss(probe).error.double()
        energy = offset_NE.square().sum()
        if energy > 0:
            self.scale_codes(float((error_NE * offset_NE).sum() / energy))
