"""Feature choice SAE: every latent has a budget of tokens per batch (Ayonrinde 2024, arXiv 2411.02124).

Shapes: N rows, D = d_in, M = d_sae latents, A under-used latents.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from saebench.core.bounds import AtLeast, AtMost
from saebench.core.codes import SparseCodes
from saebench.core.errors import UserError
from saebench.saes.base import Batch, LossTerms
from saebench.saes.mutual_choice import MutualChoiceSAE, MutualChoiceSpec, just_below, rate_after
from saebench.saes.spec import SaeSpec
from saebench.saes.zipf import ZipfLaw, budgets_by_rank, fit_zipf
from saebench_kernels import AuxCandidates, feature_choice_encode

LARGEST_EXPONENT = 1000.0
"""Of Zipf's law: far beyond it, float64 cannot distinguish the logarithms of the weights."""
SMALLEST_THRESHOLD = 1e-6
"""Relative to the largest; a latent that does not use its budget has threshold 0, which no factor changes."""


@dataclass(frozen=True, kw_only=True)
class FeatureChoiceSpec(MutualChoiceSpec):
    """Settings of a feature choice SAE."""

    name: ClassVar[str] = "feature-choice"

    budgets: Literal["zipf", "uniform"] = "zipf"
    """Matches of a latent in a batch: by Zipf's law from its rank in firing frequency, or the same for
    all."""
    mutual_share: Annotated[float, AtLeast(0)] = 0.75
    """Fraction of the run, at its start, that is trained by mutual choice and learns the frequencies."""
    zipf_exponent: Annotated[float | Literal["fit"], AtLeast(0)] = "fit"
    """Exponent of Zipf's law; 'fit' fits it to the frequencies that mutual choice found."""
    zipf_shift: Annotated[float | Literal["fit"], AtLeast(0)] = "fit"
    """Added to a rank (Zipf-Mandelbrot law); 0 is Zipf's law, 'fit' as above."""
    zipf_weights: Literal["density", "rank"] = "density"
    """Weight of a latent in that fit: its frequency, so that all matches weigh the same, or 1."""
    floor: Annotated[int, AtLeast(0)] = 1
    """Smallest number of matches of a latent in a batch; k times the batch size must suffice for all."""
    gamma: Annotated[float, AtLeast(0), AtMost(1)] = 0.5
    """A latent is under-used, and trained by the auxiliary loss, below this share of its expected frequency;
    with 0, only dead latents are, as with AuxK."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mutual_share >= 1:
            raise UserError(
                f"mutual_share is {self.mutual_share}, which leaves no step for feature choice; "
                "give less than 1, or train --sae mutual-choice"
            )
        if self.zipf_exponent != "fit" and self.zipf_exponent > LARGEST_EXPONENT:
            raise UserError(
                f"zipf_exponent is {self.zipf_exponent}; give 'fit' or at most {LARGEST_EXPONENT:g}, where "
                "the first latents already take all matches that a batch has for them"
            )

    def by_feature(self, progress: float) -> bool:
        """Whether feature choice is used at this fraction of the run; before, mutual choice is."""
        return progress >= self.mutual_share

    def check(self, *, batch_size: int, n_steps: int) -> None:
        super().check(batch_size=batch_size, n_steps=n_steps)
        if not self.by_feature((n_steps - 1) / n_steps):
            raise UserError(
                f"mutual_share is {self.mutual_share}, which leaves none of the {n_steps:,} steps to feature "
                "choice; raise --tokens or, in saebench train, lower --mutual-share"
            )
        matches = self.k * batch_size
        if self.floor * self.d_sae > matches:
            raise UserError(
                f"k = {self.k} times batch_size = {batch_size:,} is {matches:,} matches, too few for each of "
                f"d_sae = {self.d_sae:,} latents to get floor = {self.floor}; raise --batch-size or --k, "
                "lower --d-sae, or, in saebench train, pass --floor 0"
            )


class FeatureChoiceSAE(MutualChoiceSAE):
    """Lets every latent i choose its m_i best tokens of the training batch; the m_i sum to k N.

    S = the m_i largest entries of each column i of relu(W_enc (x - b_dec) + b_enc),  z = S * relu(...),
    x_hat = W_dec^T z + b_dec,  loss = |x - x_hat|^2 / d_in  +  aux_coefficient * aux_zipf.
    A latent with m_i >= 1 gets a gradient from every batch in which its best pre-activation is positive.
    A token may have no active latent: ``empty_tokens`` in the metrics.

    What follows is our reading; the paper's parametrization, schedule and inference were not available.

    Schedule: mutual choice for ``mutual_share`` of the run, then feature choice. On the demo's cache (300
    steps; d_sae 2048, k 8 and d_sae 4096, k 32) shares of 0.5, 0.75 and 0.9 left no latent dead; explained
    variance on held-out rows was 0.760, 0.765, 0.766 and 0.861, 0.860, 0.860.
    Budgets: latents are ranked by the running mean p_i of the share of tokens they fire on; rank r gets
    k N w_r / sum w with w_r = (r + shift)^-exponent, between ``floor`` and N, and the largest remainders are
    rounded up. Exponent and shift are fitted once, to the p_i of the latents alive when mutual choice ends:
    afterwards frequencies only repeat the budgets. Ranks follow p_i throughout.
    aux_zipf: with q_i the frequency that the law gives to the rank of latent i, latents with p_i < gamma q_i
    are under-used, and dead ones fully so: s_i = 1 - min(1, p_i / (gamma q_i)), or 1 if dead. It is AuxK
    over the latents with s_i > 0, their values times s_i; AuxK itself when gamma is 0.
    Inference: z_i = pre_i 1[pre_i > threshold_i], the threshold a running mean of the m_i-th largest value
    of column i. ``calibrate`` multiplies all of them by the one factor that makes the mean L0 k.
    """

    Spec = FeatureChoiceSpec
    spec: FeatureChoiceSpec
    density: Tensor
    """[M] running mean of the share of tokens on which a latent fires."""
    law: Tensor
    """[2] float64: exponent and shift, -1 until they are fitted."""
    steps_seen: Tensor

    def __init__(self, spec: SaeSpec, d_in: int) -> None:
        super().__init__(spec, d_in)
        self.register_buffer("threshold", torch.zeros(spec.d_sae))
        self.register_buffer("density", torch.zeros(spec.d_sae))
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("law", torch.full((2,), -1.0, dtype=torch.float64))

    # Training -------------------------------------------------------------------------------------

    def by_feature(self, progress: float) -> bool:
        """Whether feature choice is used at this fraction of the run; before, mutual choice is."""
        return self.spec.by_feature(progress)

    def graph_key(self, progress: float) -> Hashable | None:
        return None  # budgets are read back from the GPU

    @torch.no_grad()
    def choose(self, batch: Batch) -> SparseCodes:
        """The m_i largest positive entries of every column, without gradients; the k N largest at first."""
        if not self.by_feature(batch.progress):
            return super().choose(batch)
        values_S, indices_S, offsets = feature_choice_encode(
            self.centered_rows(batch),
            self.W_enc_MD,
            self.b_enc,
            self.budgets(len(batch.x_ND)),
            scan_dtype=self.compute_dtype,
        )
        return SparseCodes.from_ragged(values_S, indices_S, offsets, d_sae=self.d_sae)

    def budgets(self, n_rows: int) -> Tensor:
        """[M] int64: matches that each latent gets in a batch of ``n_rows``; they sum to k n_rows.

        In a batch too small for the floor (at initialization, never in a step) the floor is lowered.
        """
        return self._by_latent(self._by_rank(n_rows)[1])

    def expected_density(self, n_rows: int) -> Tensor:
        """[M] float32: the share of tokens on which each latent fires by the law, given its rank."""
        return self._by_latent(self._by_rank(n_rows)[0] / n_rows).float()

    def zipf_law(self, n_rows: int) -> ZipfLaw:
        """The fitted law, or the law fitted to the present densities of batches of ``n_rows``."""
        if self.spec.budgets == "uniform":
            return ZipfLaw(0.0, 0.0)
        exponent, shift = self.law.tolist()
        if exponent >= 0:
            return ZipfLaw(exponent, shift)
        once = rate_after(self.steps_seen) / n_rows  # what one firing adds to a density
        return fit_zipf(
            self.density[self.density >= once],
            exponent=None if self.spec.zipf_exponent == "fit" else self.spec.zipf_exponent,
            shift=None if self.spec.zipf_shift == "fit" else self.spec.zipf_shift,
            by=self.spec.zipf_weights,
        )

    def _by_rank(self, n_rows: int) -> tuple[Tensor, Tensor]:
        total = self.k * n_rows
        floor = min(self.spec.floor, total // self.d_sae)
        return budgets_by_rank(self.zipf_law(n_rows), self.d_sae, total=total, floor=floor, cap=n_rows)

    def _by_latent(self, of_rank_M: Tensor) -> Tensor:
        order_M = torch.sort(self.density, descending=True, stable=True).indices
        of_rank_M = of_rank_M.to(order_M.device)
        return torch.empty_like(of_rank_M).scatter_(0, order_M, of_rank_M)

    def under_use(self, n_rows: int) -> Tensor:
        """[M] s_i: 1 for a dead latent, 0 for one that fires at least gamma times as often as expected."""
        due_M = self.spec.gamma * self.expected_density(n_rows)
        under_M = torch.where(due_M > 0, 1 - self.density / due_M, 0.0).clamp_min(0)
        return torch.where(self.tokens_since_fired >= self.dead_after, 1.0, under_M)

    def aux_candidates(self, batch: Batch, *, listed: bool = False) -> AuxCandidates | None:
        """The under-used latents and their s_i when latents choose, the dead ones before."""
        if not self.by_feature(batch.progress):
            return super().aux_candidates(batch, listed=listed)
        under_M = self.under_use(len(batch.x_ND))
        under_A = under_M.nonzero()[:, 0]
        if len(under_A) == 0:
            return None
        return AuxCandidates(under_A, under_M[under_A], self.k_aux, weighted=True)

    @torch.no_grad()
    def after_step(self, batch: Batch, terms: LossTerms) -> None:
        n_rows = len(batch.x_ND)
        if self.by_feature(batch.progress):
            law = torch.tensor(self.zipf_law(n_rows), dtype=torch.float64)
            self.steps_averaged *= self.law[0] >= 0  # discards the thresholds of mutual choice
            self.law.copy_(law)
        super().after_step(batch, terms)
        self.steps_seen += 1
        self.density.lerp_(terms.codes.firings() / n_rows, rate_after(self.steps_seen))

    def batch_threshold(self, batch: Batch, codes: SparseCodes, smallest: Tensor) -> Tensor:
        """[M]: the m_i-th largest value of each column, 0 where fewer are positive.

        A latent without a budget gets the largest value of all latents, which it rarely exceeds.
        """
        if not self.by_feature(batch.progress):
            return smallest.expand(self.d_sae)
        values_S, latents_S = codes.values.detach(), codes.indices.long()
        if values_S.numel() == 0:
            return torch.zeros_like(self.threshold)
        counts_M = torch.bincount(latents_S, minlength=self.d_sae)
        smallest_M = torch.full_like(self.threshold, torch.inf).scatter_reduce_(
            0, latents_S, values_S, "amin"
        )
        budgets_M = self.budgets(codes.n_rows)
        smallest_M = torch.where(counts_M < budgets_M, 0.0, smallest_M)
        return torch.where(budgets_M == 0, values_S.max(), smallest_M)

    # Inference ------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, x_ND: Tensor) -> None:
        """Multiply the thresholds by the factor at which these rows have k active latents on average.

        It is just below the k N-th largest of all pre_ni / threshold_i: the mean L0 falls as the factor
        grows, so there is one such factor, and latents keep their proportions.
        """
        largest = self.threshold.max()
        threshold_M = self.threshold.clamp_min(SMALLEST_THRESHOLD * torch.where(largest > 0, largest, 1.0))
        chosen = self.largest(x_ND - self.input_bias, torch.ones_like(largest), divisor_M=threshold_M)
        self.threshold.copy_(just_below(self.smallest_of(chosen)) * threshold_M)
