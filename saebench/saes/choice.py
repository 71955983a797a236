"""What the architectures share that choose few of relu((x - b_dec) W_enc + b_enc): all but the choice.

Shapes: N rows, D = d_in, M = d_sae latents.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saebench.core.codes import SparseCodes
from saebench.saes.auxiliary import AuxSpec, aux_k, default_k_aux
from saebench.saes.base import SAE, Batch, LossTerms
from saebench.saes.functions import decode_codes, encode_chosen
from saebench.saes.fused_loss import Revival, fused_loss
from saebench.saes.spec import SaeSpec
from saebench_kernels import is_fused
from saebench_kernels.center import center

CANDIDATE_SLOTS = 256
"""The list of candidates for AuxK on a GPU has a multiple of this many slots, and of an eighth of its length:
each new length makes a captured step be captured again."""


class ChoiceSAE(SAE):
    """z = S * relu(W_enc (x - b_dec) + b_enc),  x_hat = W_dec^T z + b_dec, with S chosen by the subclass;
    loss = |x - x_hat|^2 / d_in  +  aux_coefficient * AuxK.

    A subclass writes ``choose`` (training: the whole batch may be looked at) and ``encode_rows``
    (inference: each row alone).

    On a GPU, in low precision, the loss is one fused function, and the dead latents are those that were
    dead when `refresh_dead` was last called and still are: a list whose length is known beforehand.
    """

    spec: AuxSpec
    dead_when_looked: Tensor
    """[M] bool: the candidates of AuxK on a GPU."""

    def __init__(self, spec: SaeSpec, d_in: int) -> None:
        super().__init__(spec, d_in)
        self.register_buffer("dead_when_looked", torch.zeros(spec.d_sae, dtype=torch.bool))
        self._candidates_A: Tensor | None = None

    def choose(self, batch: Batch) -> SparseCodes:
        """The entries kept of a training batch and their values; called without gradients."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it chooses")

    def loss(self, batch: Batch) -> LossTerms:
        batch = replace(batch, scratch={})
        with torch.no_grad():
            chosen = self.choose(batch)
        if self.fused:
            return self.fused_terms(batch, chosen)
        codes = self.attach_gradients(batch.x_ND, chosen)
        x_hat_ND = decode_codes(codes, self.W_dec, self.b_dec)
        return self.terms(batch, codes, x_hat_ND, (batch.x_ND - x_hat_ND).square().mean())

    @property
    def fused(self) -> bool:
        """Whether the loss takes the fused road."""
        device, dtype = self.b_dec.device, self.compute_dtype
        return not self.tied and is_fused("reconstruct", device, dtype, k=self.k, d_sae=self.d_sae)

    def trains_fused(self, n_rows: int) -> bool:
        return self.fused

    def centered(self, x_ND: Tensor) -> Tensor:
        """x - b_dec, on the fused road in the type of the products."""
        return center(x_ND, self.b_dec, dtype=self.compute_dtype) if self.fused else x_ND - self.b_dec

    @torch.no_grad()
    def centered_rows(self, batch: Batch) -> Tensor:
        """``centered`` of a batch's rows, made once in a loss."""
        if batch.scratch is None:
            return self.centered(batch.x_ND)
        if "centered" not in batch.scratch:
            batch.scratch["centered"] = self.centered(batch.x_ND)
        return batch.scratch["centered"]

    def attach_gradients(self, x_ND: Tensor, chosen: SparseCodes) -> SparseCodes:
        """``chosen`` with the gradients of its values for the encoder's weights."""
        return encode_chosen(x_ND, self.W_enc_MD, self.b_enc, self.b_dec, chosen)

    def terms(
        self, batch: Batch, codes: SparseCodes, x_hat_ND: Tensor, objective: Tensor, **extra: Tensor
    ) -> LossTerms:
        """``objective`` (what is minimized of the reconstruction) plus the auxiliary loss."""
        error_ND = (batch.x_ND - x_hat_ND).detach()
        auxiliary = batch.x_ND.new_zeros(())
        if self.spec.aux_coefficient > 0:
            auxiliary = self.auxiliary_loss(batch, error_ND)
        total = objective + self.spec.aux_coefficient * auxiliary
        reconstruction = error_ND.square().mean()
        extra |= self.extra_metrics(batch, codes)
        return LossTerms(total, reconstruction, auxiliary.detach(), codes, error_ND, extra)

    def fused_terms(self, batch: Batch, chosen: SparseCodes) -> LossTerms:
        """The same loss, by fused kernels."""
        centered_ND = self.centered_rows(batch)
        weights = (self.W_enc_MD, self.b_enc, self.W_dec, self.b_dec)
        revival = self.revival(batch) if self.spec.aux_coefficient > 0 else None
        objective, auxiliary, error_ND = fused_loss(batch.x_ND, chosen, centered_ND, weights, revival)
        total = objective + self.spec.aux_coefficient * auxiliary
        extra = self.extra_metrics(batch, chosen)
        return LossTerms(total, objective.detach(), auxiliary.detach(), chosen, error_ND, extra)

    def extra_metrics(self, batch: Batch, codes: SparseCodes) -> dict[str, Tensor]:
        """Further scalars of a step for the metrics."""
        return {}

    def auxiliary_loss(self, batch: Batch, error_ND: Tensor) -> Tensor:
        """AuxK over the dead latents."""
        return aux_k(self, batch.x_ND, error_ND, self.dead_latents(), k_aux=self.spec.k_aux)

    # AuxK on a GPU --------------------------------------------------------------------------------

    def revival(self, batch: Batch) -> Revival | None:
        """What AuxK may use on the fused road; None when nothing was dead."""
        candidates_A = self._candidates_A
        if candidates_A is None or len(candidates_A) == 0:
            return None
        dead_M = self.dead_when_looked & (self.tokens_since_fired >= self.dead_after)
        dead_A = dead_M[candidates_A]
        dead_A[1:] &= candidates_A[1:] > 0  # the slots that are left over repeat latent 0
        return Revival(candidates_A, dead_A.float(), default_k_aux(self, self.spec.k_aux))

    @torch.no_grad()
    def refresh_dead(self, *, reuse: bool = False) -> None:
        """Renew the candidates of AuxK; waits for the GPU, so it is called every few steps.

        ``reuse`` lists those that were found the last time: a training that is resumed goes on with them.
        """
        if not reuse:
            self.dead_when_looked.copy_(self.tokens_since_fired >= self.dead_after)
        candidates_A = self._list_candidates()
        if self.n_candidates == len(candidates_A) and self._candidates_A is not None:
            self._candidates_A.copy_(candidates_A)  # a captured step reads it where it is
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
