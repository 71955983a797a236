"""Adam on float32 parameters, with projection, clipping and normalization, in one pass over the parameters.

Order of a step: project the decoder's gradient, measure the norm of the whole gradient, clip, apply Adam,
give rows unit norm, write the low-precision copy. The norm needs a pass of its own, since clipping uses it.

Shapes: M rows (latents), D = d_in.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _squares(g, w, out, d, n, D: tl.constexpr, PROJECT: tl.constexpr):
    """Squared norm of each row of g, without its part along the row of w."""
    # From the end to the beginning, since what was written last is still in the cache.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    cols = tl.arange(0, D)
    at = row * d + cols
    inside = (cols < d) & (at < n)
    grad = tl.load(g + at, mask=inside, other=0.0)
    if PROJECT:
        unit = tl.load(w + at, mask=inside, other=0.0)
        grad -= tl.sum(grad * unit) * unit
    tl.store(out + row, tl.sum(grad * grad))


@triton.jit
def _adam(
    p, m, v, g, low, coefficients, d, n, beta1, beta2, eps, tiny,
    D: tl.constexpr, PROJECT: tl.constexpr, UNIT: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    rate = tl.load(coefficients)
    root = tl.load(coefficients + 1)
    clip = tl.load(coefficients + 2)
    is_finite = tl.load(coefficients + 3)
    if is_finite != 0:
        row = tl.program_id(0).to(tl.int64)
        cols = tl.arange(0, D)
        at = row * d + cols
        inside = (cols < d) & (at < n)
        weight = tl.load(p + at, mask=inside, other=0.0)
        grad = tl.load(g + at, mask=inside, other=0.0)
        first = tl.load(m + at, mask=inside, other=0.0)
        second = tl.load(v + at, mask=inside, other=0.0)
        if PROJECT:
            grad -= tl.sum(grad * weight) * weight
        grad *= clip
        first += (grad - first) * (1 - beta1)
        second = second * beta2 + (1 - beta2) * grad * grad
        weight -= rate * first / (tl.sqrt(second) / root + eps)
        if UNIT:
            weight /= tl.maximum(tl.sqrt(tl.sum(tl.where(inside, weight * weight, 0.0))), tiny)
        tl.store(p + at, weight, mask=inside)
        tl.store(m + at, first, mask=inside)
        tl.store(v + at, second, mask=inside)
        if LOW:
            tl.store(low + at, weight.to(low.dtype.element_ty), mask=inside)


@triton.jit
def _coefficients(
    squares, n_squares, lr, limit, log_beta1, log_beta2, step, is_finite, norm, out, BLOCK: tl.constexpr
):
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in tl.range(0, n_squares, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(squares + at, mask=at < n_squares, other=0.0)
    length = tl.sqrt(tl.sum(total))
    fine = (tl.load(is_finite) != 0) & (length < float("inf"))  # NaN is not below infinity
    t = tl.load(step) + fine.to(tl.float32)
    clip = 1.0
    if limit > 0:
        clip = tl.minimum(limit / (length + 1e-6), 1.0)
    of_mean = 1 - tl.exp(t.to(tl.float64) * log_beta1)
    of_square = 1 - tl.exp(t.to(tl.float64) * log_beta2)
    tl.store(norm, length)
    tl.store(is_finite, fine)
    tl.store(out, (tl.load(lr) / of_mean).to(tl.float32))
    tl.store(out + 1, tl.sqrt(of_square).to(tl.float32))
    tl.store(out + 2, clip)
    tl.store(out + 3, fine.to(tl.float32))


def adam_coefficients(
    squares: Tensor,
    step: Tensor,
    is_finite: Tensor,
    lr: Tensor,
    *,
    betas: tuple[float, float],
    grad_clip: float,
) -> tuple[Tensor, Tensor]:
    """The coefficients of `fused_adam` for step ``step`` + 1, and the gradient's norm before clipping
    (scalar).

    ``squares`` are the results of `gradient_squares`, concatenated. ``is_finite`` (scalar bool) becomes False
    when the norm is not finite. ``lr`` is float64, on the device; ``grad_clip`` 0 does not clip.
    """
    norm, out_4 = squares.new_empty(()), squares.new_empty(4)
    _coefficients[(1,)](
        squares,
        len(squares),
        lr,
        grad_clip,
        *map(math.log, betas),
        step,
        is_finite,
        norm,
        out_4,
        BLOCK=4096,
        num_warps=8,
    )
    return out_4, norm


def n_pieces(grad: Tensor, *, whole_rows: bool) -> int:
    """The number of squared norms that `gradient_squares` writes."""
    return _pieces(grad, whole_rows=whole_rows)[0]


def gradient_squares(grad: Tensor, unit: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Squared norms of pieces of a gradient, to be summed; with ``unit`` rows, of its part orthogonal to
    them."""
    rows, d, width = _pieces(grad, whole_rows=unit is not None)
    if out is None:
        out = torch.empty(rows, dtype=torch.float32, device=grad.device)
    _squares[(rows,)](
        grad,
        unit if unit is not None else grad,
        out,
        d,
        grad.numel(),
        D=width,
        PROJECT=unit is not None,
        num_warps=_warps(width),
    )
    return out


def fused_adam(
    parameter: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    coefficients_4: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    project: bool = False,
    unit_rows: bool = False,
    low: Tensor | None = None,
) -> None:
    """One step of torch.optim.Adam (no weight decay) in place, all float32 and contiguous.

    Args:
        coefficients_4: on the device: lr / (1 - beta1^t), sqrt(1 - beta2^t), the factor by which the gradient
            is clipped, and whether to apply the step at all (0 leaves everything as it is).
        project: first remove the gradient's part along each row (of unit norm).
        unit_rows: give each row unit norm afterwards.
        low: a copy in another type, written from the new parameter.
    """
    rows, d, width = _pieces(parameter, whole_rows=unit_rows or project)
    _adam[(rows,)](
        parameter,
        exp_avg,
        exp_avg_sq,
        grad,
        low if low is not None else parameter,
        coefficients_4,
        d,
        parameter.numel(),
        betas[0],
        betas[1],
        eps,
        torch.finfo(torch.float32).tiny,
        D=width,
        PROJECT=project,
        UNIT=unit_rows,
        LOW=low is not None,
        num_warps=_warps(width),
    )


def _pieces(tensor: Tensor, *, whole_rows: bool) -> tuple[int, int, int]:
    """Number of programs, elements per program, and that number rounded up to a power of two."""
    if whole_rows:
        return tensor.shape[0], tensor.shape[1], triton.next_power_of_2(tensor.shape[1])
    return triton.cdiv(tensor.numel(), _BLOCK), _BLOCK, _BLOCK


def _warps(width: int) -> int:
    return max(1, min(8, width // 256))
