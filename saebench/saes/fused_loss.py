"""The loss of a choice SAE as one differentiable function, with the fused kernels of a GPU.

What ``ChoiceSAE.loss`` puts together from ``encode_chosen``, ``decode_codes`` and ``aux_k`` is here one
forward and one backward pass in low precision: the rows of the dictionary are gathered once, both weight
gradients come from one sorted list, and AuxK is dense over the few latents that were dead when last looked.
Nothing waits for the GPU and every shape is known beforehand, so that a step can be captured as a graph.

Shapes: N rows, S entries of all rows end to end, D = d_in, M = d_sae latents, A candidates of AuxK.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from saebench.core.codes import SparseCodes
from saebench_kernels import rounded

SMALLEST_SHARE = 1e-5
"""Rows whose errors vary by less than this share of them are equal, up to the rounding of float32 sums."""


class Revival(NamedTuple):
    """Which latents AuxK may use, a list of fixed length."""

    candidates_A: Tensor
    """int64; slots without a candidate repeat latent 0."""
    weights_A: Tensor
    """float32: 0 where the slot has none or its latent is alive again, else what its values count."""
    k_aux: int
    weighted: bool = False
    """Whether the weights are others than 0 and 1."""


def fused_loss(
    x_ND: Tensor,
    chosen: SparseCodes,
    centered_ND: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    revival: Revival | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``objective`` = mean (x - x_hat)^2, ``auxiliary`` = AuxK, and the error x - x_hat [N, D], detached.

    Differentiable in ``weights`` = (W_enc_MD, b_enc, W_dec, b_dec), the choice held fixed.

    Args:
        centered_ND: x - b_dec in the type in which products are made (bfloat16 or float16); the error and
            all that is gathered or multiplied is rounded to it, sums are float32.
    """
    found: tuple[Tensor, Tensor, Tensor] = _ChoiceLoss.apply(  # type: ignore[no-untyped-call]
        x_ND, chosen, centered_ND, revival, *weights
    )
    return found


class _ChoiceLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        chosen: SparseCodes,
        centered_ND: Tensor,
        revival: Revival | None,
        W_enc_MD: Tensor,
        b_enc_M: Tensor,
        W_dec_MD: Tensor,
        b_dec_D: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from saebench_kernels.fused.center import column_sums
        from saebench_kernels.fused.reconstruct import reconstruct

        dtype = centered_ND.dtype
        W_enc_low_MD, W_dec_low_MD = rounded(W_enc_MD, dtype), rounded(W_dec_MD, dtype)
        error_ND, squared_N, dots_S = reconstruct(
            chosen.indices, chosen.values, x_ND, W_dec_low_MD, b_dec_D, k=chosen.k, offsets=chosen.offsets
        )
        energy = squared_N.sum()
        sum_D = column_sums(error_ND)
        auxiliary, ctx.revived = energy.new_zeros(()), None
        if revival is not None:
            # Of the rounded error, as the sums over rows are: what varies is a difference of the two.
            rounded_energy = torch.linalg.vector_norm(error_ND, dtype=torch.float32).square()
            variance = rounded_energy - sum_D.square().sum() / len(x_ND)
            # Infinity, not a quotient mended afterwards: its gradient would be 0 / 0.
            variance = torch.where(variance > SMALLEST_SHARE * rounded_energy, variance, torch.inf)
            auxiliary, ctx.revived = _revive(
                revival, centered_ND, error_ND, variance, W_enc_low_MD, b_enc_M, W_dec_low_MD
            )
        ctx.chosen, ctx.revival = chosen, revival
        ctx.save_for_backward(centered_ND, error_ND, sum_D, dots_S, W_enc_low_MD)
        ctx.mark_non_differentiable(error_ND)
        ctx.set_materialize_grads(False)  # not of the error: nobody asks for it
        return energy / x_ND.numel(), auxiliary, error_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from saebench_kernels.fused.weight_grads import sort_pairs, weight_grads

        centered_ND, error_ND, sum_D, dots_S, W_enc_low_MD = ctx.saved_tensors
        chosen: SparseCodes = ctx.chosen
        of_objective, of_auxiliary = (sum_D.new_zeros(()) if grad is None else grad for grad in grads[:2])
        scale = of_objective * (-2 / error_ND.numel())  # of the error: d objective / d x_hat
        rows_S = chosen.rows() if chosen.k is None else None
        pairs = sort_pairs(chosen.indices, chosen.d_sae, k=chosen.k, rows_S=rows_S)
        d_W_dec_MD, d_W_enc_MD, d_b_enc_M = weight_grads(
            pairs, chosen.values, dots_S, error_ND, centered_ND, scale
        )
        low_M = d_b_enc_M.to(W_enc_low_MD.dtype)
        d_b_dec_D = sum_D * scale - (low_M @ W_enc_low_MD).float()
        if ctx.revived is not None:
            _add_revival(ctx, of_auxiliary, d_W_enc_MD, d_b_enc_M, d_W_dec_MD)
        return None, None, None, None, d_W_enc_MD, d_b_enc_M, d_W_dec_MD, d_b_dec_D


def _revive(
    revival: Revival,
    centered_ND: Tensor,
    error_ND: Tensor,
    variance: Tensor,
    W_enc_MD: Tensor,
    b_enc_M: Tensor,
    W_dec_MD: Tensor,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """AuxK as in auxiliary.py, and what its gradient needs."""
    from saebench_kernels.fused.select import keep_topk

    candidates_A, weights_A, k_aux, weighted = revival
    b_enc_A = torch.where(weights_A > 0, b_enc_M[candidates_A], -torch.inf).to(centered_ND.dtype)
    pre_NA = torch.addmm(b_enc_A, centered_ND, W_enc_MD[candidates_A].T).relu_()
    if k_aux < len(candidates_A):
        keep_topk(pre_NA, k_aux)
    if weighted:
        pre_NA.mul_(weights_A)
    left_ND = torch.addmm(error_ND, pre_NA, W_dec_MD[candidates_A], alpha=-1)
    energy = torch.linalg.vector_norm(left_ND, dtype=torch.float32).square()
    auxiliary = torch.where((weights_A > 0).any(), energy / variance, 0.0)
    return auxiliary, (centered_ND, pre_NA, left_ND, variance, W_dec_MD)


def _add_revival(ctx: Any, grad: Tensor, d_W_enc_MD: Tensor, d_b_enc_M: Tensor, d_W_dec_MD: Tensor) -> None:
    from saebench_kernels.fused.center import column_sums

    candidates_A, weights_A, _, weighted = ctx.revival
    centered_ND, pre_NA, left_ND, variance, W_dec_MD = ctx.revived
    scale = grad * -2 / variance
    d_pre_NA = torch.ops.aten.threshold_backward(left_ND @ W_dec_MD[candidates_A].T, pre_NA, 0)
    if weighted:
        d_pre_NA.mul_(weights_A)
    # Each candidate has one slot of weight above 0, and the others add zeros: the order does not matter.
    d_W_dec_MD.index_add_(0, candidates_A, (pre_NA.T @ left_ND).float() * scale)
    d_W_enc_MD.index_add_(0, candidates_A, (d_pre_NA.T @ centered_ND).float() * scale)
    d_b_enc_M.index_add_(0, candidates_A, column_sums(d_pre_NA) * scale)
