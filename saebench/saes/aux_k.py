"""Base class of the SAEs that revive dead latents with AuxK (Gao et al. 2024, section A.2), and its settings.

Shapes: N rows, D = d_in, M = d_sae latents, A candidates of AuxK.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from saebench.core.bounds import AtLeast
from saebench.core.codes import SparseCodes
from saebench.saes.base import SAE, Batch, LossTerms
from saebench.saes.spec import SaeSpec
from saebench_kernels import (
    AuxCandidates,
    SaeWeights,
    aux_k,
    center,
    is_reconstruction_loss_fused,
    reconstruction_loss,
    sparse_encode,
)

CANDIDATE_SLOTS = 256
"""The list of candidates for AuxK on a GPU has a multiple of this many slots, and of an eighth of its length:
each new length makes a captured step be captured again."""


@dataclass(frozen=True, kw_only=True)
class AuxSpec(SaeSpec):
    """Settings of the architectures that revive dead latents with AuxK."""

    k_aux: Annotated[int | None, AtLeast(1)] = None
    """Dead latents that AuxK picks for each token; half of the width of what is reconstructed by default."""
    aux_coefficient: Annotated[float, AtLeast(0)] = 1 / 32
    """Weight of the AuxK loss; 0 switches it off."""
    dead_tokens: Annotated[int, AtLeast(1)] = 10_000_000
    """A latent is dead when it has not fired for this many tokens, or for 10% of the run if that is less."""


class AuxKSAE(SAE):
    """z = S * relu(W_enc (x - b_dec) + b_enc),  x_hat = W_dec^T z + b_dec, with S selected by the subclass;
    loss = |x - x_hat|^2 / d_in  +  aux_coefficient * AuxK.

    A subclass writes ``choose`` (training: it may use the whole batch) and ``encode_rows`` (inference: each
    row alone).

    On a GPU, in low precision, the loss is fused, and the candidates of AuxK are the latents that were dead
    when `refresh_dead` was last called and still are: a list of known length.
    """

    spec: AuxSpec
    dead_when_looked: Tensor
    """[M] bool: the latents that were dead when `refresh_dead` was last called."""

    def __init__(self, spec: SaeSpec, d_in: int) -> None:
        super().__init__(spec, d_in)
        self.register_buffer("dead_when_looked", torch.zeros(spec.d_sae, dtype=torch.bool))
        self._candidates_A: Tensor | None = None

    @property
    def dead_tokens(self) -> int:
        return self.spec.dead_tokens

    def choose(self, batch: Batch) -> SparseCodes:
        """The entries kept of a training batch and their values; called without gradients."""
        raise NotImplementedError(f"{type(self).__name__} does not define choose")

    def loss(self, batch: Batch) -> LossTerms:
        batch = replace(batch, scratch={})
        with torch.no_grad():
            chosen = self.choose(batch)
        objective, auxiliary, error_ND = reconstruction_loss(
            batch.x_ND,
            self.centered_rows(batch),
            chosen.values,
            chosen.entries,
            self.weights,
            self.aux_candidates(batch, listed=self.is_fused) if self.spec.aux_coefficient > 0 else None,
            target_NE=self.target_of_latents(batch),
        )
        total = objective
        if self.spec.skip:
            total = objective + self.skip_gradient(batch, error_ND)
        return self.add_up(batch, chosen, error_ND, total, auxiliary, objective)

    def target_of_latents(self, batch: Batch) -> Tensor | None:
        """[N, E] what the latents reconstruct if it is not the input: what the skip connection leaves of it.

        Without gradients; see `skip_gradient`.
        """
        if not self.spec.skip:
            return batch.target_NE
        with torch.no_grad():
            return batch.y_NE - self.skipped(batch.x_ND)

    def skip_gradient(self, batch: Batch, error_NE: Tensor) -> Tensor:
        """A scalar of value 0 with the gradient of mean (y - y_hat)^2 for W_skip.

        The reconstruction loss takes its target as data. Its gradient for y_hat is -2 error / (N E), and the
        skip connection is a part of y_hat.
        """
        product = (error_NE.float() * self.skipped(batch.x_ND)).sum() * (-2 / error_NE.numel())
        return product - product.detach()

    @property
    def weights(self) -> SaeWeights:
        """The weights that the reconstruction and AuxK use."""
        b_in_D = self.b_in if self.spec.is_transcoder else None
        return SaeWeights(self.W_enc_MD, self.b_enc, self.W_dec, self.b_dec, b_in_D)

    @property
    def is_fused(self) -> bool:
        """Whether the loss uses the fused kernels of a GPU."""
        device, dtype = self.b_dec.device, self.compute_dtype
        return not self.tied and is_reconstruction_loss_fused(device, dtype, k=self.k, d_sae=self.d_sae)

    def trains_fused(self, n_rows: int) -> bool:
        return self.is_fused

    def centered(self, x_ND: Tensor) -> Tensor:
        """x - b_in (b_dec); where the loss is fused, in the type in which products are computed."""
        bias_D = self.input_bias
        return center(x_ND, bias_D, dtype=self.compute_dtype) if self.is_fused else x_ND - bias_D

    @torch.no_grad()
    def centered_rows(self, batch: Batch) -> Tensor:
        """``centered`` of a batch's rows, computed once per loss."""
        if batch.scratch is None:
            return self.centered(batch.x_ND)
        if "centered" not in batch.scratch:
            batch.scratch["centered"] = self.centered(batch.x_ND)
        return batch.scratch["centered"]

    def attach_gradients(self, x_ND: Tensor, chosen: SparseCodes) -> SparseCodes:
        """``chosen`` with the gradients of its values for the encoder's weights."""
        values_S = sparse_encode(
            chosen.values, chosen.entries, x_ND, self.W_enc_MD, self.b_enc, self.input_bias
        )
        return chosen.with_values(values_S)

    def terms(
        self, batch: Batch, codes: SparseCodes, x_hat_ND: Tensor, objective: Tensor, **extra: Tensor
    ) -> LossTerms:
        """``objective`` (what is minimized of the reconstruction ``x_hat``) plus the auxiliary loss."""
        error_ND = (batch.y_NE - x_hat_ND).detach()
        auxiliary = batch.x_ND.new_zeros(())
        if self.spec.aux_coefficient > 0:
            auxiliary = self.auxiliary_loss(batch, error_ND)
        return self.add_up(batch, codes, error_ND, objective, auxiliary, error_ND.square().mean(), **extra)

    def add_up(
        self,
        batch: Batch,
        codes: SparseCodes,
        error_ND: Tensor,
        objective: Tensor,
        auxiliary: Tensor,
        reconstruction: Tensor,
        **extra: Tensor,
    ) -> LossTerms:
        """The terms of a loss whose parts are known."""
        total = objective + self.spec.aux_coefficient * auxiliary
        extra |= self.extra_metrics(batch, codes)
        return LossTerms(total, reconstruction.detach(), auxiliary.detach(), codes, error_ND, extra)

    def extra_metrics(self, batch: Batch, codes: SparseCodes) -> dict[str, Tensor]:
        """Further scalars of a step for the metrics."""
        return {}

    # AuxK -----------------------------------------------------------------------------------------

    @property
    def k_aux(self) -> int:
        """Dead latents that AuxK picks per row."""
        return self.spec.k_aux or max(1, self.d_out // 2)

    def auxiliary_loss(self, batch: Batch, error_ND: Tensor) -> Tensor:
        """AuxK of a reconstruction's (detached) error, a scalar."""
        W_enc_MD, b_enc_M, W_dec_ME, *_ = self.weights
        candidates = self.aux_candidates(batch)
        return aux_k(batch.x_ND, error_ND, candidates, W_enc_MD, b_enc_M, W_dec_ME, self.input_bias)

    def aux_candidates(self, batch: Batch, *, listed: bool = False) -> AuxCandidates | None:
        """The latents that AuxK may use: the dead ones; None if there are none.

        ``listed`` takes them from the list that `refresh_dead` made, so that nothing waits for the GPU;
        latents in it that have fired since have weight 0.
        """
        if not listed:
            dead_A = self.dead_latents()
            ones_A = torch.ones(len(dead_A), device=dead_A.device)
            return AuxCandidates(dead_A, ones_A, self.k_aux) if len(dead_A) else None
        if self._candidates_A is None or len(self._candidates_A) == 0:
            return None
        dead_M = self.dead_when_looked & (self.tokens_since_fired >= self.dead_after)
        dead_A = dead_M[self._candidates_A]
        dead_A[1:] &= self._candidates_A[1:] > 0  # unused slots repeat latent 0
        return AuxCandidates(self._candidates_A, dead_A.float(), self.k_aux)

    @torch.no_grad()
    def refresh_dead(self, *, reuse: bool = False) -> None:
        """Update the list of AuxK's candidates; waits for the GPU, so it is called every few steps.

        ``reuse`` lists those that were found the last time, for a training that is resumed.
        """
        if not reuse:
            self.dead_when_looked.copy_(self.tokens_since_fired >= self.dead_after)
        candidates_A = self._list_candidates()
        if self.n_candidates == len(candidates_A) and self._candidates_A is not None:
            self._candidates_A.copy_(candidates_A)  # a captured step reads it from where it is
        else:
            self._candidates_A = candidates_A

    @property
    def n_candidates(self) -> int:
        """Slots in the list of candidates."""
        return 0 if self._candidates_A is None else len(self._candidates_A)

    def _list_candidates(self) -> Tensor:
        dead_A = self.dead_when_looked.nonzero()[:, 0]
        unit = max(CANDIDATE_SLOTS, 1 << max(0, len(dead_A).bit_length() - 4))
        return torch.nn.functional.pad(dead_A, (0, -len(dead_A) % unit))
