"""Decode the few active latents of each row without forming the dense code.

Shapes: N rows, S entries of all rows end to end, D = d_in, M = d_sae latents.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saebench_kernels.entries import Entries
from saebench_kernels.gathered_dots import gathered_dots
from saebench_kernels.latent_sums import latent_sums


def sparse_decode(values_S: Tensor, entries: Entries, W_dec_MD: Tensor, b_dec_D: Tensor) -> Tensor:
    """``x_hat[n] = sum over entries s of row n of values[s] W_dec[indices[s]]  +  b_dec``, shape [N, D].

    Differentiable in the values, ``W_dec`` and ``b_dec``. Every row is summed in the order of its entries by
    one worker, and so is every row of the gradients: results repeat bit for bit. Neither pass forms an [N, M]
    tensor.
    """
    starts_N = entries.row_offsets[:-1].int()
    if not torch.is_grad_enabled():
        return _decode(values_S, entries, starts_N, W_dec_MD, b_dec_D)
    x_hat_ND: Tensor = _SparseDecode.apply(  # type: ignore[no-untyped-call]
        values_S, entries, starts_N, W_dec_MD, b_dec_D
    )
    return x_hat_ND


def _decode(
    values_S: Tensor, entries: Entries, starts_N: Tensor, W_dec_MD: Tensor, b_dec_D: Tensor
) -> Tensor:
    sums_ND = F.embedding_bag(entries.indices, W_dec_MD, starts_N, per_sample_weights=values_S, mode="sum")
    return sums_ND + b_dec_D


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values_S: Tensor, entries: Entries, starts_N: Tensor, W_dec_MD: Tensor, b_dec_D: Tensor
    ) -> Tensor:
        ctx.entries = entries
        ctx.save_for_backward(values_S, starts_N, W_dec_MD)
        return _decode(values_S, entries, starts_N, W_dec_MD, b_dec_D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values_S, starts_N, W_dec_MD = ctx.saved_tensors
        d_x_hat_ND = grads[0].contiguous()
        d_values_S = gathered_dots(ctx.entries.indices, starts_N, d_x_hat_ND, W_dec_MD)
        d_W_dec_MD = latent_sums(ctx.entries.groups, values_S, d_x_hat_ND)
        return d_values_S, None, None, d_W_dec_MD, d_x_hat_ND.sum(0)
