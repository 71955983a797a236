"""Mutual choice SAE, also known as BatchTopK: one budget of matches for all tokens of a batch.

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
"""Weight of a new batch in the running statistics, which so remember about 100 steps."""
HINT_SHARE = 0.95
"""The scan of a batch gathers what exceeds this share of the batch before's smallest match."""


@dataclass(frozen=True, kw_only=True)
class MutualChoiceSpec(AuxSpec):
    """Settings of a mutual choice SAE."""

    name: ClassVar[str] = "mutual-choice"


class MutualChoiceSAE(AuxKSAE):
    """Keeps the k N largest pre-activations of a training batch of N tokens, whichever tokens they are of.

    S = the k N largest entries of relu(W_enc (x - b_dec) + b_enc) over tokens and latents (all positive ones
    when there are fewer; of equals the first), z = S * relu(...), x_hat = W_dec^T z + b_dec,
    loss = |x - x_hat|^2 / d_in  +  aux_coefficient * AuxK. A hard token gets more latents than an easy one.

    That choice needs the whole batch, so it is only made in training (``choose``). Inference (``encode``)
    reads each token alone, z = pre * 1[pre > threshold], with one ``threshold`` for all. Our reading (the
    paper does not say how it infers): while training goes on, the threshold is a running mean of the
    smallest match of a batch; at the end ``calibrate`` sets it to what makes the mean L0 of unseen rows k.
    """

    Spec = MutualChoiceSpec
    spec: MutualChoiceSpec
    weight_names = (*AuxKSAE.weight_names, "threshold")
    threshold: Tensor
    """float32, of shape () or, in a subclass, [M]: what a pre-activation must exceed at inference."""
    smallest_match: Tensor
    """Smallest value kept of the last batch, 0 when the budget was not used up."""
    steps_averaged: Tensor
    """How many steps the running threshold is a mean of; beyond 100 the oldest fade."""

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

        Each latent's are divided by its ``divisor``.

        The nearer ``expected`` is to the smallest of them the faster they are found.
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
        """The share of tokens that were left without a match."""
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
        """The threshold that would choose from this batch what ``codes`` did; of the threshold's shape.

        ``smallest`` is the smallest value of ``codes``, see ``smallest_of``.
        """
        return smallest

    def smallest_of(self, codes: SparseCodes) -> Tensor:
        """The smallest value of codes that use up their budget, else 0: all that is positive was kept."""
        if codes.values.numel() < self.k * codes.n_rows:
            return codes.values.new_zeros(())
        return codes.values.detach().min()  # with room to spare there is padding, whose 0 is right

    # Inference ------------------------------------------------------------------------------------

    def encode_rows(self, x_ND: Tensor) -> SparseCodes:
        """Codes of rows [N, D]: the pre-activations above the threshold, as many as there are."""
        with torch.no_grad():
            values_S, indices_S, offsets = threshold_encode(
                self.centered(x_ND), self.W_enc_MD, self.b_enc, self.threshold, scan_dtype=self.compute_dtype
            )
        chosen = SparseCodes.from_ragged(values_S, indices_S, offsets, d_sae=self.d_sae)
        return self.attach_gradients(x_ND, chosen)

    @torch.no_grad()
    def calibrate(self, x_ND: Tensor) -> None:
        """Set the threshold to just below the k N-th largest of all pre-activations of these N rows.

        Inference then keeps k of a row in the mean, exactly so on these rows (up to ties).
        """
        chosen = self.largest(x_ND - self.b_dec, self.smallest_match)
        self.threshold.copy_(just_below(self.smallest_of(chosen)))

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        """As in every SAE; a threshold is compared with codes and shrinks as they do."""
        super().fold_scale(scale)
        self.threshold.div_(scale)


def rate_after(steps: Tensor) -> Tensor:
    """Weight of the newest batch in a running statistic of so many; the first ones are averaged."""
    return steps.float().reciprocal().clamp_min(STATISTICS_RATE)


def just_below(value: Tensor) -> Tensor:
    """The next smaller number, but not below 0: what ``value`` itself exceeds."""
    return torch.nextafter(value, torch.full_like(value, -torch.inf)).clamp_min(0)
