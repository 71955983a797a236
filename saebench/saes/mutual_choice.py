"""Mutual choice (BatchTopK) SAE: one budget of active latents for all tokens of a batch.

Ayonrinde 2024, arXiv 2411.02124; Bussmann et al. 2024, arXiv 2412.06410.

Shapes: N rows, D = d_in, M = d_sae latents.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saebench.core.codes import SparseCodes
from saebench.saes.aux_k import AuxKSAE, AuxSpec
from saebench.saes.base import INIT_ROWS, Batch, LossTerms
from saebench.saes.spec import SaeSpec
from saebench_kernels import mutual_choice_encode, threshold_encode

STATISTICS_RATE = 0.01
"""Weight of a new batch in the running statistics, which thus average about 100 steps."""
HINT_SHARE = 0.95
"""The scan of a batch gathers what exceeds this share of the previous batch's smallest value kept."""


@dataclass(frozen=True, kw_only=True)
class MutualChoiceSpec(AuxSpec):
    """Settings of a mutual choice SAE."""

    name: ClassVar[str] = "mutual-choice"


class MutualChoiceSAE(AuxKSAE):
    """Keeps the k N largest pre-activations of a training batch of N tokens, whichever tokens they belong to.

    S = the k N largest entries of relu(W_enc (x - b_dec) + b_enc) over tokens and latents (all positive ones
    when there are fewer; of equals the first), z = S * relu(...), x_hat = W_dec^T z + b_dec, loss = |x -
    x_hat|^2 / d_in  +  aux_coefficient * AuxK. A token that is hard to reconstruct gets more latents.

    That choice needs the whole batch, so it is only made in training (``choose``). Inference (``encode``)
    encodes each token alone, z = pre * 1[pre > threshold], with one ``threshold`` for all. The paper does not
    describe inference; in our reading, the threshold during training is a running mean of the smallest value
    kept per batch, and at the end ``calibrate`` sets it so that the mean L0 of held-out rows is k.
    """

    Spec = MutualChoiceSpec
    spec: MutualChoiceSpec
    weight_names = (*AuxKSAE.weight_names, "threshold")
    threshold: Tensor
    """float32, of shape () or, in a subclass, [M]: a pre-activation above it is active at inference."""
    smallest_match: Tensor
    """Smallest value kept of the last batch, 0 when the budget was not used up."""
    steps_averaged: Tensor
    """Number of steps in the running mean of the threshold; beyond 100 it is an exponential mean."""

    def __init__(self, spec: SaeSpec, d_in: int) -> None:
        super().__init__(spec, d_in)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("smallest_match", torch.zeros(()))
        self.register_buffer("steps_averaged", torch.zeros((), dtype=torch.int64))

    # Training -------------------------------------------------------------------------------------

    def graph_key(self, progress: float) -> Hashable | None:
        return self.n_candidates if self.is_fused else None

    @torch.no_grad()
    def choose(self, batch: Batch) -> SparseCodes:
        """The k N largest entries of the batch, without gradients."""
        return self.largest(self.centered_rows(batch), self.smallest_match, scan_dtype=self.compute_dtype)

    def largest(
        self,
        centered_ND: Tensor,
        expected: Tensor,
        *,
        divisor_M: Tensor | None = None,
        scan_dtype: torch.dtype = torch.float32,
    ) -> SparseCodes:
        """The k N largest of ``relu(W_enc (x - b_dec) + b_enc)`` for rows x - b_dec.

        The pre-activations of each latent are divided by its ``divisor``. The nearer ``expected`` is to the
        smallest of them, the faster they are found.
        """
        W_enc_MD: Tensor = self.W_enc_MD
        b_enc_M: Tensor = self.b_enc
        if divisor_M is not None:
            W_enc_MD, b_enc_M = W_enc_MD / divisor_M[:, None], b_enc_M / divisor_M
        values_S, indices_S, offsets = mutual_choice_encode(
            centered_ND,
            W_enc_MD,
            b_enc_M,
            self.k * len(centered_ND),
            HINT_SHARE * expected,
            scan_dtype=scan_dtype,
        )
        return SparseCodes.from_ragged(values_S, indices_S, offsets, d_sae=self.d_sae)

    def extra_metrics(self, batch: Batch, codes: SparseCodes) -> dict[str, Tensor]:
        """The share of tokens without an active latent."""
        return {"empty_tokens": (codes.row_offsets.diff() == 0).float().mean()}

    @torch.no_grad()
    def initialize(self, sample: Batch, *, seed: int) -> None:
        super().initialize(sample, seed=seed)
        probe = sample[:INIT_ROWS]
        codes = self.choose(probe)
        self.threshold.copy_(self.batch_threshold(probe, codes, self.smallest_of(codes)))

    @torch.no_grad()
    def after_step(self, batch: Batch, terms: LossTerms) -> None:
        super().after_step(batch, terms)
        smallest = self.smallest_of(terms.codes)
        self.smallest_match.copy_(smallest)
        self.steps_averaged += 1
        threshold = self.batch_threshold(batch, terms.codes, smallest)
        self.threshold.lerp_(threshold, rate_after(self.steps_averaged))

    def batch_threshold(self, batch: Batch, codes: SparseCodes, smallest: Tensor) -> Tensor:
        """The threshold that would select the entries of ``codes`` from this batch; of the threshold's shape.

        ``smallest`` is the smallest value of ``codes``, see ``smallest_of``.
        """
        return smallest

    def smallest_of(self, codes: SparseCodes) -> Tensor:
        """The smallest value of codes that use up their budget; otherwise 0, since all positive ones were
        kept."""
        if codes.values.numel() < self.k * codes.n_rows:
            return codes.values.new_zeros(())
        return codes.values.detach().min()  # padding has the value 0, which is right here

    # Inference ------------------------------------------------------------------------------------

    def encode_rows(self, x_ND: Tensor) -> SparseCodes:
        """Codes of rows [N, D]: all pre-activations above the threshold."""
        with torch.no_grad():
            values_S, indices_S, offsets = threshold_encode(
                self.centered(x_ND), self.W_enc_MD, self.b_enc, self.threshold, scan_dtype=self.compute_dtype
            )
        chosen = SparseCodes.from_ragged(values_S, indices_S, offsets, d_sae=self.d_sae)
        return self.attach_gradients(x_ND, chosen)

    @torch.no_grad()
    def calibrate(self, x_ND: Tensor) -> None:
        """Set the threshold to just below the k N-th largest of all pre-activations of these N rows.

        Inference then keeps k per row on average, exactly so on these rows (up to ties).
        """
        chosen = self.largest(x_ND - self.input_bias, self.smallest_match)
        self.threshold.copy_(just_below(self.smallest_of(chosen)))

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        """As for every SAE; the threshold is compared with codes, so it is divided by ``scale``, too."""
        super().fold_scale(scale)
        self.threshold.div_(scale)


def rate_after(steps: Tensor) -> Tensor:
    """Weight of the newest batch in a running statistic after ``steps``; the first 100 steps are averaged."""
    return steps.float().reciprocal().clamp_min(STATISTICS_RATE)


def just_below(value: Tensor) -> Tensor:
    """The next smaller number that ``value`` exceeds, but at least 0."""
    return torch.nextafter(value, torch.full_like(value, -torch.inf)).clamp_min(0)
