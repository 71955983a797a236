"""The reconstruction loss of an SAE at selected entries, with AuxK.

Fused, it is one forward and one backward pass in low precision: the rows of the dictionary are gathered once,
both weight gradients come from one sorted list, and AuxK is dense over its candidates. Nothing waits for the
GPU and every shape is known beforehand, so a step can be captured as a CUDA graph.

Shapes: N rows, S entries of all rows end to end, D = d_in, E = d_out (D for an SAE), M = d_sae latents, A
candidates of AuxK.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from saebench_kernels.aux_k import AuxCandidates, aux_k
from saebench_kernels.dispatch import is_fused
from saebench_kernels.entries import Entries
from saebench_kernels.rounded import rounded
from saebench_kernels.sparse_decode import sparse_decode
from saebench_kernels.sparse_encode import sparse_encode

_SMALLEST_SHARE = 1e-5
"""Errors whose variance is below this share of their energy are equal, up to the rounding of float32 sums."""


class SaeWeights(NamedTuple):
    """The float32 weights of an SAE, or of a transcoder, with an encoder and a decoder."""

    W_enc_MD: Tensor
    b_enc_M: Tensor
    W_dec_ME: Tensor
    b_dec_E: Tensor
    b_in_D: Tensor | None = None
    """What a transcoder subtracts from its input, a constant; None for an SAE, which subtracts b_dec."""

    @property
    def input_bias_D(self) -> Tensor:
        """What is subtracted from the input."""
        return self.b_dec_E if self.b_in_D is None else self.b_in_D


class ReconstructionLoss(NamedTuple):
    """What `reconstruction_loss` returns."""

    objective: Tensor
    """Scalar: mean of (y - y_hat)^2 over rows and columns; differentiable in the weights."""
    auxiliary: Tensor
    """Scalar: AuxK, 0 without candidates; differentiable in the weights."""
    error_NE: Tensor
    """y - y_hat, detached: float32, or fused in the type of the products."""


def is_reconstruction_loss_fused(device: torch.device, dtype: torch.dtype, *, k: int, d_sae: int) -> bool:
    """Whether the loss of a step with ``k`` entries per row is fused when rows are centered in ``dtype``."""
    return is_fused("reconstruction_loss", device, dtype, k=k, d_sae=d_sae)


def reconstruction_loss(
    x_ND: Tensor,
    centered_ND: Tensor,
    values_S: Tensor,
    entries: Entries,
    weights: SaeWeights,
    candidates: AuxCandidates | None = None,
    *,
    target_NE: Tensor | None = None,
) -> ReconstructionLoss:
    """``y_hat[n] = sum values[s] W_dec[indices[s]] + b_dec`` against y, and AuxK of what it leaves.

    The values are those of ``relu((x - b_in) W_enc^T + b_enc)`` at the entries, and the selection of entries
    is held fixed. For an SAE y is x and b_in is b_dec.

    Args:
        x_ND: float32.
        centered_ND: x - b_in in the type in which products are computed. In bfloat16 or float16 on a GPU
            the loss is fused (see dispatch.py): the error and everything that is gathered or multiplied is
            rounded to that type, and sums are float32. Eager, all of it is float32.
        target_NE: y, float32; by default x.
    """
    target_NE = x_ND if target_NE is None else target_NE
    if is_fused("reconstruction_loss", x_ND.device, centered_ND.dtype, d_sae=entries.d_sae):
        return reconstruction_loss_fused(target_NE, centered_ND, values_S, entries, weights, candidates)
    return reconstruction_loss_eager(x_ND, values_S, entries, weights, candidates, target_NE=target_NE)


def reconstruction_loss_eager(
    x_ND: Tensor,
    values_S: Tensor,
    entries: Entries,
    weights: SaeWeights,
    candidates: AuxCandidates | None = None,
    *,
    target_NE: Tensor | None = None,
) -> ReconstructionLoss:
    """`reconstruction_loss` in plain torch, all float32."""
    W_enc_MD, b_enc_M, W_dec_ME, b_dec_E, _ = weights
    b_in_D = weights.input_bias_D
    target_NE = x_ND if target_NE is None else target_NE
    values_S = sparse_encode(values_S, entries, x_ND, W_enc_MD, b_enc_M, b_in_D)
    y_hat_NE = sparse_decode(values_S, entries, W_dec_ME, b_dec_E)
    objective = (target_NE - y_hat_NE).square().mean()
    error_NE = (target_NE - y_hat_NE).detach()
    auxiliary = aux_k(x_ND, error_NE, candidates, W_enc_MD, b_enc_M, W_dec_ME, b_in_D)
    return ReconstructionLoss(objective, auxiliary, error_NE)


def reconstruction_loss_fused(
    target_NE: Tensor,
    centered_ND: Tensor,
    values_S: Tensor,
    entries: Entries,
    weights: SaeWeights,
    candidates: AuxCandidates | None = None,
) -> ReconstructionLoss:
    """`reconstruction_loss` by fused kernels."""
    found: tuple[Tensor, Tensor, Tensor] = _FusedLoss.apply(  # type: ignore[no-untyped-call]
        target_NE, centered_ND, values_S, entries, candidates, weights.b_in_D is None, *weights[:4]
    )
    return ReconstructionLoss(*found)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        target_NE: Tensor,
        centered_ND: Tensor,
        values_S: Tensor,
        entries: Entries,
        candidates: AuxCandidates | None,
        subtracts_b_dec: bool,
        W_enc_MD: Tensor,
        b_enc_M: Tensor,
        W_dec_ME: Tensor,
        b_dec_E: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from saebench_kernels.fused.center import column_sums
        from saebench_kernels.fused.reconstruct import reconstruct

        dtype = centered_ND.dtype
        W_enc_low_MD, W_dec_low_ME = rounded(W_enc_MD, dtype), rounded(W_dec_ME, dtype)
        error_NE, squared_N, dots_S = reconstruct(
            entries.indices, values_S, target_NE, W_dec_low_ME, b_dec_E, k=entries.k, offsets=entries.offsets
        )
        energy = squared_N.sum()
        sum_E = column_sums(error_NE)
        auxiliary, ctx.aux = energy.new_zeros(()), None
        if candidates is not None:
            # Of the rounded error, as the sums over rows are: what varies is a difference of the two.
            rounded_energy = torch.linalg.vector_norm(error_NE, dtype=torch.float32).square()
            variance = rounded_energy - sum_E.square().sum() / len(target_NE)
            # Infinity makes a quotient 0; replacing it afterwards would leave 0 / 0 in its gradient.
            variance = torch.where(variance > _SMALLEST_SHARE * rounded_energy, variance, torch.inf)
            auxiliary, ctx.aux = _aux_k(
                candidates, centered_ND, error_NE, variance, W_enc_low_MD, b_enc_M, W_dec_low_ME
            )
        ctx.entries, ctx.candidates, ctx.subtracts_b_dec = entries, candidates, subtracts_b_dec
        ctx.save_for_backward(values_S, centered_ND, error_NE, sum_E, dots_S, W_enc_low_MD)
        ctx.mark_non_differentiable(error_NE)
        ctx.set_materialize_grads(False)  # no zeros for the gradient of the error
        return energy / target_NE.numel(), auxiliary, error_NE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from saebench_kernels.fused.weight_grads import sort_pairs, weight_grads

        values_S, centered_ND, error_NE, sum_E, dots_S, W_enc_low_MD = ctx.saved_tensors
        entries: Entries = ctx.entries
        of_objective, of_auxiliary = (sum_E.new_zeros(()) if grad is None else grad for grad in grads[:2])
        scale = of_objective * (-2 / error_NE.numel())  # times the error: d objective / d y_hat
        rows_S = entries.rows() if entries.k is None else None
        pairs = sort_pairs(entries.indices, entries.d_sae, k=entries.k, rows_S=rows_S)
        d_W_dec_ME, d_W_enc_MD, d_b_enc_M = weight_grads(
            pairs, values_S, dots_S, error_NE, centered_ND, scale
        )
        d_b_dec_E = sum_E * scale
        if ctx.subtracts_b_dec:
            d_b_dec_E -= (d_b_enc_M.to(W_enc_low_MD.dtype) @ W_enc_low_MD).float()
        if ctx.aux is not None:
            _add_aux_gradients(ctx, of_auxiliary, d_W_enc_MD, d_b_enc_M, d_W_dec_ME)
        return None, None, None, None, None, None, d_W_enc_MD, d_b_enc_M, d_W_dec_ME, d_b_dec_E


def _aux_k(
    candidates: AuxCandidates,
    centered_ND: Tensor,
    error_NE: Tensor,
    variance: Tensor,
    W_enc_MD: Tensor,
    b_enc_M: Tensor,
    W_dec_ME: Tensor,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """AuxK as `aux_k` defines it, and what its gradient needs."""
    from saebench_kernels.fused.select import keep_topk

    latents_A, weights_A, k_aux, weighted = candidates
    b_enc_A = torch.where(weights_A > 0, b_enc_M[latents_A], -torch.inf).to(centered_ND.dtype)
    pre_NA = torch.addmm(b_enc_A, centered_ND, W_enc_MD[latents_A].T).relu_()
    if k_aux < len(latents_A):
        keep_topk(pre_NA, k_aux)
    if weighted:
        pre_NA.mul_(weights_A)
    left_NE = torch.addmm(error_NE, pre_NA, W_dec_ME[latents_A], alpha=-1)
    energy = torch.linalg.vector_norm(left_NE, dtype=torch.float32).square()
    auxiliary = torch.where((weights_A > 0).any(), energy / variance, 0.0)
    return auxiliary, (centered_ND, pre_NA, left_NE, variance, W_dec_ME)


def _add_aux_gradients(
    ctx: Any, grad: Tensor, d_W_enc_MD: Tensor, d_b_enc_M: Tensor, d_W_dec_ME: Tensor
) -> None:
    from saebench_kernels.fused.center import column_sums

    latents_A, weights_A, _, weighted = ctx.candidates
    centered_ND, pre_NA, left_NE, variance, W_dec_ME = ctx.aux
    scale = grad * -2 / variance
    d_pre_NA = torch.ops.aten.threshold_backward(left_NE @ W_dec_ME[latents_A].T, pre_NA, 0)
    if weighted:
        d_pre_NA.mul_(weights_A)
    # Each candidate has one slot with a weight above 0, and the others add zeros: the order does not matter.
    d_W_dec_ME.index_add_(0, latents_A, (pre_NA.T @ left_NE).float() * scale)
    d_W_enc_MD.index_add_(0, latents_A, (d_pre_NA.T @ centered_ND).float() * scale)
    d_b_enc_M.index_add_(0, latents_A, column_sums(d_pre_NA) * scale)
