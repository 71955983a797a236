"""Sparse encode and decode as differentiable functions: forward and backward never form an [N, M] code.

Shapes: N rows, D = d_in, M = d_sae latents, K kept a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saebench.codes import SparseCodes
from saebench_kernels import gathered_dots, group_by_latent, latent_sums, sparse_decode, topk_encode


class TopKEncode(torch.autograd.Function):
    """``values, indices = top k of relu((x - b_dec) W_enc^T + b_enc)``; gradients for weights and biases.

    ``x`` is data and gets no gradient. A value of zero was cut by the ReLU or is padding: it passes none.
    The gradient of ``b_dec`` is -(sum over rows of d_pre) W_enc, one matrix-vector product.
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor, b_dec_D: Tensor, k: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        centred_ND = x_ND - b_dec_D
        values_NK, indices_NK = topk_encode(centred_ND, W_enc_MD, b_enc_M, k, scan_dtype=dtype)
        ctx.save_for_backward(centred_ND, W_enc_MD, values_NK, indices_NK)
        ctx.mark_non_differentiable(indices_NK)
        return values_NK, indices_NK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        centred_ND, W_enc_MD, values_NK, indices_NK = ctx.saved_tensors
        d_pre_NK = grads[0] * (values_NK > 0)
        groups = group_by_latent(indices_NK, W_enc_MD.shape[0])
        d_W_enc_MD = latent_sums(groups, d_pre_NK, centred_ND)
        d_b_enc_M = latent_sums(groups, d_pre_NK, torch.ones_like(centred_ND[:, :1]))[:, 0]
        return None, d_W_enc_MD, d_b_enc_M, -(d_b_enc_M @ W_enc_MD), None, None


class SparseDecode(torch.autograd.Function):
    """``x_hat[n] = sum_k values[n, k] W_dec[indices[n, k]] + b_dec``, gradients for values and weights."""

    @staticmethod
    def forward(ctx: Any, values_NK: Tensor, indices_NK: Tensor, W_dec_MD: Tensor, b_dec_D: Tensor) -> Tensor:
        ctx.save_for_backward(values_NK, indices_NK, W_dec_MD)
        return sparse_decode(indices_NK, values_NK, W_dec_MD) + b_dec_D

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d_x_hat_ND,) = grads
        values_NK, indices_NK, W_dec_MD = ctx.saved_tensors
        d_values_NK = gathered_dots(indices_NK, d_x_hat_ND, W_dec_MD)
        groups = group_by_latent(indices_NK, W_dec_MD.shape[0])
        d_W_dec_MD = latent_sums(groups, values_NK, d_x_hat_ND.contiguous())
        return d_values_NK, None, d_W_dec_MD, d_x_hat_ND.sum(0)


def decode_codes(codes: SparseCodes, W_dec_MD: Tensor, b_dec_D: Tensor) -> Tensor:
    """Decode rectangular or ragged codes to [N, D]; differentiable."""
    if codes.k is not None:
        indices_NK, values_NK = codes.rectangular()
        x_hat_ND: Tensor = SparseDecode.apply(values_NK, indices_NK.long(), W_dec_MD, b_dec_D)  # type: ignore[no-untyped-call]
        return x_hat_ND
    bags_ND = torch.nn.functional.embedding_bag(
        codes.indices, W_dec_MD, codes.row_offsets[:-1].int(), per_sample_weights=codes.values, mode="sum"
    )
    return bags_ND + b_dec_D
