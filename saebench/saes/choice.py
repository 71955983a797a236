"""What the architectures share that choose few of relu((x - b_dec) W_enc + b_enc): all but the choice.

Shapes: N rows, D = d_in, M = d_sae latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench.saes.auxiliary import AuxSpec, aux_k
from saebench.saes.base import SAE, Batch, LossTerms
from saebench.saes.functions import decode_codes, encode_chosen


class ChoiceSAE(SAE):
    """z = S * relu(W_enc (x - b_dec) + b_enc),  x_hat = W_dec^T z + b_dec, with S chosen by the subclass;
    loss = |x - x_hat|^2 / d_in  +  aux_coefficient * AuxK.

    A subclass writes ``choose`` (training: the whole batch may be looked at) and ``encode_rows``
    (inference: each row alone).
    """

    spec: AuxSpec

    def choose(self, batch: Batch) -> SparseCodes:
        """The entries kept of a training batch and their values; called without gradients."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it chooses")

    def loss(self, batch: Batch) -> LossTerms:
        with torch.no_grad():
            chosen = self.choose(batch)
        codes = self.attach_gradients(batch.x_ND, chosen)
        x_hat_ND = decode_codes(codes, self.W_dec, self.b_dec)
        return self.terms(batch, codes, x_hat_ND, (batch.x_ND - x_hat_ND).square().mean())

    def attach_gradients(self, x_ND: Tensor, chosen: SparseCodes) -> SparseCodes:
        """``chosen`` with the gradients of its values for the encoder's weights."""
        return encode_chosen(x_ND, self.W_enc_MD, self.b_enc, self.b_dec, chosen)

    def terms(
        self, batch: Batch, codes: SparseCodes, x_hat_ND: Tensor, objective: Tensor, **extra: Tensor
    ) -> LossTerms:
        """``objective`` (what is minimised of the reconstruction) plus the auxiliary loss."""
        error_ND = (batch.x_ND - x_hat_ND).detach()
        auxiliary = batch.x_ND.new_zeros(())
        if self.spec.aux_coefficient > 0:
            auxiliary = self.auxiliary_loss(batch, error_ND)
        total = objective + self.spec.aux_coefficient * auxiliary
        reconstruction = error_ND.square().mean()
        return LossTerms(total, reconstruction, auxiliary.detach(), codes, x_hat_ND.detach(), extra)

    def auxiliary_loss(self, batch: Batch, error_ND: Tensor) -> Tensor:
        """AuxK over the dead latents."""
        return aux_k(self, batch.x_ND, error_ND, self.dead_latents(), k_aux=self.spec.k_aux)
