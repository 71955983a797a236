"""Gradients of an encoder at the entries that a selection has kept.

Shapes: N rows, S entries of all rows end to end, D = d_in, M = d_sae latents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saebench_kernels.entries import Entries
from saebench_kernels.latent_sums import latent_sums


def sparse_encode(
    values_S: Tensor, entries: Entries, x_ND: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor, b_dec_D: Tensor
) -> Tensor:
    """``values_S`` with the gradients of ``relu((x - b_dec) W_enc^T + b_enc)`` at the entries.

    A selection computed the values without gradients. Differentiable in the three weights; ``x`` is data, and
    the selection itself has no gradient. A value of zero was cut by the ReLU or is padding, so it passes no
    gradient. Neither pass forms an [N, M] tensor.
    """
    if not torch.is_grad_enabled():
        return values_S
    out_S: Tensor = _SparseEncode.apply(  # type: ignore[no-untyped-call]
        values_S, entries, x_ND, W_enc_MD, b_enc_M, b_dec_D
    )
    return out_S


class _SparseEncode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values_S: Tensor,
        entries: Entries,
        x_ND: Tensor,
        W_enc_MD: Tensor,
        b_enc_M: Tensor,
        b_dec_D: Tensor,
    ) -> Tensor:
        ctx.entries = entries
        ctx.save_for_backward(values_S, x_ND, W_enc_MD, b_dec_D)
        return values_S.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values_S, x_ND, W_enc_MD, b_dec_D = ctx.saved_tensors
        d_pre_S = grads[0] * (values_S > 0)
        d_W_enc_MD = latent_sums(ctx.entries.groups, d_pre_S, x_ND - b_dec_D)
        d_b_enc_M = latent_sums(ctx.entries.groups, d_pre_S, torch.ones_like(x_ND[:, :1]))[:, 0]
        # Every latent takes b_dec away from its rows: one matrix-vector product.
        d_b_dec_D = -(d_b_enc_M @ W_enc_MD) if ctx.needs_input_grad[5] else None
        return None, None, None, d_W_enc_MD, d_b_enc_M, d_b_dec_D
