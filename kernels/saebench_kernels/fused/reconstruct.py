"""Decode, and compute the residual, its square and the dot products of the backward pass, in one kernel.

One warp processes a row of the batch, a few columns at a time. The dictionary rows that it uses are gathered
once: the columns in registers serve both the reconstruction and the dot products with the residual.

Shapes: N rows, D = d_in, M = d_sae latents, S entries of all rows end to end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048
"""Elements of dictionary rows that a warp holds."""
_MOST_ENTRIES = 64
"""Entries processed together; the atoms of rows with more are gathered again for the dot products."""


@triton.jit
def _atoms(w, indices, values, first, stop, d_in, cols, inside, K: tl.constexpr):
    at = first + tl.arange(0, K)
    real = at < stop
    latents = tl.load(indices + at, mask=real, other=0).to(tl.int64)
    z = tl.load(values + at, mask=real, other=0.0)
    there = real[:, None] & inside[None, :]
    return z, tl.load(w + latents[:, None] * d_in + cols[None, :], mask=there, other=0.0).to(tl.float32)


@triton.jit
def _reconstruct(
    x, w, b_dec, indices, values, offsets, error, squared, dots, d_in, k,
    K: tl.constexpr, COLS: tl.constexpr, RAGGED: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if RAGGED:
        start = tl.load(offsets + row)
        stop = tl.load(offsets + row + 1)
    else:
        start = row * k
        stop = start + k
    squares = tl.zeros((COLS,), dtype=tl.float32)
    products = tl.zeros((K,), dtype=tl.float32)
    for c in tl.range(0, d_in, COLS):
        cols = c + tl.arange(0, COLS)
        inside = cols < d_in
        r = tl.load(x + row * d_in + cols, mask=inside, other=0.0) - tl.load(
            b_dec + cols, mask=inside, other=0.0
        )
        if ONCE:
            z, atoms = _atoms(w, indices, values, start, stop, d_in, cols, inside, K)
            r -= tl.sum(z[:, None] * atoms, 0)
            products += tl.sum(atoms * r[None, :], 1)
        else:
            for first in tl.range(start, stop, K):
                z, atoms = _atoms(w, indices, values, first, stop, d_in, cols, inside, K)
                r -= tl.sum(z[:, None] * atoms, 0)
        squares += r * r
        tl.store(error + row * d_in + cols, r.to(error.dtype.element_ty), mask=inside)
    tl.store(squared + row, tl.sum(squares))
    if ONCE:
        at = start + tl.arange(0, K)
        tl.store(dots + at, products, mask=at < stop)
    else:
        tl.debug_barrier()  # the residual just stored is read again, by other threads
        for first in tl.range(start, stop, K):
            products = tl.zeros((K,), dtype=tl.float32)
            for c in tl.range(0, d_in, COLS):
                cols = c + tl.arange(0, COLS)
                inside = cols < d_in
                z, atoms = _atoms(w, indices, values, first, stop, d_in, cols, inside, K)
                r = tl.load(error + row * d_in + cols, mask=inside, other=0.0).to(tl.float32)
                products += tl.sum(atoms * r[None, :], 1)
            at = first + tl.arange(0, K)
            tl.store(dots + at, products, mask=at < stop)


def reconstruct(
    indices_S: Tensor,
    values_S: Tensor,
    x_ND: Tensor,
    W_dec_MD: Tensor,
    b_dec_D: Tensor,
    *,
    k: int | None = None,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``error = x - (sum of values[s] W_dec[indices[s]] + b_dec)`` of each row, its square and its products.

    Row n has entries [k n, k n + k), or [offsets[n], offsets[n + 1]) where offsets [N + 1] are given. x,
    b_dec and values are float32, W_dec of any float type; sums are float32, in a fixed order.

    Returns:
        ``error_ND`` in the type of W_dec; ``squared_N`` = |error|^2 of each row, float32;
        ``dots_S`` = error . W_dec[indices[s]], float32, of entries that belong to a row.
    """
    n_rows, d_in = x_ND.shape
    x_ND, W_dec_MD = x_ND.contiguous(), W_dec_MD.contiguous()
    several = triton.next_power_of_2(k) if k is not None else 32
    once = k is not None and several <= _MOST_ENTRIES
    several = min(several, _MOST_ENTRIES)
    error_ND = torch.empty(n_rows, d_in, dtype=W_dec_MD.dtype, device=x_ND.device)
    squared_N = torch.empty(n_rows, dtype=torch.float32, device=x_ND.device)
    dots_S = torch.empty(len(indices_S), dtype=torch.float32, device=x_ND.device)
    _reconstruct[(n_rows,)](
        x_ND,
        W_dec_MD,
        b_dec_D,
        indices_S,
        values_S,
        offsets if offsets is not None else indices_S,
        error_ND,
        squared_N,
        dots_S,
        d_in,
        k or 0,
        K=several,
        COLS=min(_TILE // several, max(16, triton.next_power_of_2(d_in))),
        RAGGED=offsets is not None,
        ONCE=once,
        num_warps=1,
    )
    return error_ND, squared_N, dots_S
