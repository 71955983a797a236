"""Sparse encode and decode as differentiable functions: forward and backward never form an [N, M] code.

A selection rule has chosen the entries (which latents of which rows, and their values) without gradients;
the functions here attach the gradients, so all rules share them.

Shapes: N rows, S entries of all rows end to end, D = d_in, M = d_sae latents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saebench.core.codes import SparseCodes
from saebench_kernels import gathered_dots, latent_sums, sparse_decode


def encode_chosen(
    x_ND: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor, b_dec_D: Tensor, chosen: SparseCodes
) -> SparseCodes:
    """``chosen`` with the gradients of ``relu((x - b_dec) W_enc^T + b_enc)`` at its entries.

    ``x`` is data and gets no gradient, and neither does the choice itself. A value of zero was cut by the
    ReLU or is padding: it passes none.
    """
    if not torch.is_grad_enabled():
        return chosen
    values_S: Tensor = _Encode.apply(  # type: ignore[no-untyped-call]
        chosen.values, chosen, x_ND, W_enc_MD, b_enc_M, b_dec_D
    )
    return chosen.with_values(values_S)


def decode_codes(codes: SparseCodes, W_dec_MD: Tensor, b_dec_D: Tensor) -> Tensor:
    """``x_hat[n] = sum of values[s] W_dec[indices[s]] over the entries of row n, + b_dec``, shape [N, D].

    Differentiable in the values, ``W_dec`` and ``b_dec``.
    """
    starts_N = codes.row_offsets[:-1].int()
    if not torch.is_grad_enabled():
        return sparse_decode(codes.indices, starts_N, codes.values, W_dec_MD) + b_dec_D
    x_hat_ND: Tensor = _Decode.apply(  # type: ignore[no-untyped-call]
        codes.values, codes, starts_N, W_dec_MD, b_dec_D
    )
    return x_hat_ND


class _Encode(torch.autograd.Function):
    """Gradients of the entries' pre-activations; that of b_dec is one matrix-vector product."""

    @staticmethod
    def forward(
        ctx: Any,
        values_S: Tensor,
        chosen: SparseCodes,
        x_ND: Tensor,
        W_enc_MD: Tensor,
        b_enc_M: Tensor,
        b_dec_D: Tensor,
    ) -> Tensor:
        ctx.chosen = chosen
        ctx.save_for_backward(values_S, x_ND, W_enc_MD, b_dec_D)
        return values_S.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values_S, x_ND, W_enc_MD, b_dec_D = ctx.saved_tensors
        d_pre_S = grads[0] * (values_S > 0)
        d_W_enc_MD = latent_sums(ctx.chosen.groups, d_pre_S, x_ND - b_dec_D)
        d_b_enc_M = latent_sums(ctx.chosen.groups, d_pre_S, torch.ones_like(x_ND[:, :1]))[:, 0]
        return None, None, None, d_W_enc_MD, d_b_enc_M, -(d_b_enc_M @ W_enc_MD)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values_S: Tensor,
        codes: SparseCodes,
        starts_N: Tensor,
        W_dec_MD: Tensor,
        b_dec_D: Tensor,
    ) -> Tensor:
        ctx.codes = codes
        ctx.save_for_backward(values_S, starts_N, W_dec_MD)
        return sparse_decode(codes.indices, starts_N, values_S, W_dec_MD) + b_dec_D

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values_S, starts_N, W_dec_MD = ctx.saved_tensors
        d_x_hat_ND = grads[0].contiguous()
        d_values_S = gathered_dots(ctx.codes.indices, starts_N, d_x_hat_ND, W_dec_MD)
        d_W_dec_MD = latent_sums(ctx.codes.groups, values_S, d_x_hat_ND)
        return d_values_S, None, None, d_W_dec_MD, d_x_hat_ND.sum(0)
