"""Both weight gradients of sparse codes from one sorted list of active pairs, without atomics.

One warp owns a part of a row of the gradient and sums over the batch's rows in which its latent is active,
always in the same order. The pairs of a latent with many are divided into chunks: the first is summed by the
program of its row, the others by programs of their own whose sums are added afterwards, again in a fixed
order.

Shapes: N rows, D = d_in, E = d_out (D for an SAE), M = d_sae latents, S sorted pairs (latent, row), C chunks
beyond the first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 128
"""Pairs that one program sums."""
_COLS = 256
"""Columns per warp: 16 bytes of half-precision rows per thread. With more columns, or more pairs at once, it
is slower by a quarter to twice (S1 and S2 on an H100)."""


_SEARCHED = 128
"""Positions that one warp searches."""


class SortedPairs(NamedTuple):
    """The entries of a batch sorted by latent, and how they are divided into chunks."""

    order_S: Tensor
    """Position of each sorted entry in the original order, int64."""
    rows_S: Tensor | None
    """Row of each entry in the original order; None where entry s belongs to row s // k."""
    k: int
    starts: Tensor
    """[M + 1] int32: where each latent's entries begin."""
    extra: Tensor
    """[M + 1] int32: where each latent's chunks beyond the first begin, among all chunks beyond the first."""
    owner_C: Tensor
    """Latent of each chunk beyond the first, int32; M for unused ones."""


def sort_pairs(
    indices_S: Tensor, d_sae: int, *, k: int | None = None, rows_S: Tensor | None = None
) -> SortedPairs:
    """Sort entries by latent; stable, so that sums repeat bit for bit. Does not wait for the GPU.

    Entry s belongs to row s // k, or to row rows[s].
    """
    device, n_entries = indices_S.device, len(indices_S)
    shift, dtype = 0, torch.int32
    if d_sae <= 1 << 16:  # half as many bits, half as many passes
        shift, dtype = (1 << 15 if d_sae > 1 << 15 else 0), torch.int16
    latents_S, order_S = torch.sort((indices_S - shift if shift else indices_S).to(dtype), stable=True)
    starts, extra = torch.empty(2, d_sae + 1, dtype=torch.int32, device=device).unbind()
    owner_C = torch.empty(n_entries // CHUNK, dtype=torch.int32, device=device)
    steps = max(1, n_entries).bit_length()
    _bounds[(triton.cdiv(d_sae + 1, _SEARCHED),)](
        latents_S,
        starts,
        extra,
        shift,
        d_sae,
        n_entries,
        STEPS=steps,
        SIZE=CHUNK,
        BLOCK=_SEARCHED,
        num_warps=1,
    )
    torch.cumsum(extra, 0, dtype=torch.int32, out=extra)
    if len(owner_C):
        _owners[(triton.cdiv(len(owner_C), _SEARCHED),)](
            extra, owner_C, d_sae, len(owner_C), STEPS=d_sae.bit_length(), BLOCK=_SEARCHED, num_warps=1
        )
    return SortedPairs(order_S, rows_S, k or 1, starts, extra, owner_C)


@triton.jit
def _first_at_least(numbers, wanted, n, STEPS: tl.constexpr):
    """Position of the first of the ascending ``numbers`` that is at least ``wanted``; n if there is none."""
    low = tl.zeros_like(wanted)
    high = low + n
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        open_ = low < high
        below = open_ & (tl.load(numbers + middle, mask=open_, other=0).to(tl.int32) < wanted)
        low = tl.where(below, middle + 1, low)
        high = tl.where(open_ & ~below, middle, high)
    return low


@triton.jit
def _bounds(
    latents, starts, extra, shift, d_sae, n_entries,
    STEPS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where each latent's entries begin; and, one position later, the number of chunks beyond the first."""
    latent = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = _first_at_least(latents, latent - shift, n_entries, STEPS)
    before = _first_at_least(latents, latent - 1 - shift, n_entries, STEPS)
    tl.store(starts + latent, start, mask=latent <= d_sae)
    n_extra = tl.where(latent > 0, tl.maximum(start - before - 1, 0) // SIZE, 0)
    tl.store(extra + latent, n_extra, mask=latent <= d_sae)


@triton.jit
def _owners(extra, owner, d_sae, n_chunks, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """The latent of each chunk beyond the first: the last latent whose chunks begin no later."""
    chunk = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    latent = _first_at_least(extra + 1, chunk + 1, d_sae, STEPS)
    tl.store(owner + chunk, latent, mask=chunk < n_chunks)


@triton.jit
def _sums(
    order, rows, starts, extra, owner, values, dots, scale,
    a_table, a_out, a_extra, b_table, b_out, b_extra, total_out, total_extra,
    n_latents, d_a, d_b,
    K: tl.constexpr, COLS: tl.constexpr, SIZE: tl.constexpr, RAGGED: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """ALONE: the table of a has one row per entry, each with weight 1, and there is no b."""
    program = tl.program_id(0)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    in_a = cols < d_a
    in_b = cols < d_b
    latent = program
    chunk = 0
    if program >= n_latents:
        latent = tl.load(owner + program - n_latents)
        if latent < n_latents:
            chunk = 1 + program - n_latents - tl.load(extra + latent)
    if latent < n_latents:
        start = tl.load(starts + latent) + chunk * SIZE
        stop = tl.minimum(tl.load(starts + latent + 1), start + SIZE)
        a = tl.zeros((COLS,), dtype=tl.float32)
        b = tl.zeros((COLS,), dtype=tl.float32)
        total = 0.0
        for at in tl.range(start, stop):
            entry = tl.load(order + at).to(tl.int32)
            if RAGGED:
                row = tl.load(rows + entry)
            else:
                row = entry // K
            place = row.to(tl.int64) * d_a + cols
            addend = tl.load(a_table + place, mask=in_a, other=0.0).to(tl.float32)
            if ALONE:
                a += addend
            else:
                value = tl.load(values + entry)
                dot = tl.where(value > 0, tl.load(dots + entry), 0.0)
                a += value * addend
                place_b = row.to(tl.int64) * d_b + cols
                b += dot * tl.load(b_table + place_b, mask=in_b, other=0.0).to(tl.float32)
                total += dot
        factor = tl.load(scale)
        a *= factor
        b *= factor
        total *= factor
        if program < n_latents:
            tl.store(a_out + latent.to(tl.int64) * d_a + cols, a, mask=in_a)
            if not ALONE:
                tl.store(b_out + latent.to(tl.int64) * d_b + cols, b, mask=in_b)
                if tl.program_id(1) == 0:
                    tl.store(total_out + latent, total)
        else:
            other = (program - n_latents).to(tl.int64)
            tl.store(a_extra + other * d_a + cols, a, mask=in_a)
            if not ALONE:
                tl.store(b_extra + other * d_b + cols, b, mask=in_b)
                if tl.program_id(1) == 0:
                    tl.store(total_extra + other, total)


@triton.jit
def _add_chunks(
    extra, owner, a_out, a_extra, b_out, b_extra, total_out, total_extra, n_latents, d_a, d_b,
    D: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    latent = tl.load(owner + chunk)
    if latent < n_latents:
        first = tl.load(extra + latent)
        if first == chunk:
            cols = tl.arange(0, D)
            in_a = cols < d_a
            in_b = cols < d_b
            place_a = latent.to(tl.int64) * d_a + cols
            place_b = latent.to(tl.int64) * d_b + cols
            a = tl.load(a_out + place_a, mask=in_a, other=0.0)
            b = tl.zeros((D,), dtype=tl.float32)
            total = 0.0
            if not ALONE:
                b = tl.load(b_out + place_b, mask=in_b, other=0.0)
                total = tl.load(total_out + latent)
            for other in tl.range(first, tl.load(extra + latent + 1)):
                a += tl.load(a_extra + other * d_a + cols, mask=in_a, other=0.0)
                if not ALONE:
                    b += tl.load(b_extra + other * d_b + cols, mask=in_b, other=0.0)
                    total += tl.load(total_extra + other)
            tl.store(a_out + place_a, a, mask=in_a)
            if not ALONE:
                tl.store(b_out + place_b, b, mask=in_b)
                tl.store(total_out + latent, total)


def weight_grads(
    pairs: SortedPairs, values_S: Tensor, dots_S: Tensor, error_NE: Tensor, x_ND: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """For each latent m, over its pairs (n, m) with entry s, all times ``scale`` (a scalar tensor):

    ``d_W_dec[m] = sum values[s] error[n]`` [M, E], ``d_W_enc[m] = sum dots[s] x[n]`` [M, D] and ``d_b_enc[m]
    = sum dots[s]`` [M], all float32, the latter two over the entries with a value above 0.
    """
    n_latents = len(pairs.starts) - 1
    d_W_dec_ME, d_W_enc_MD = (
        torch.empty(n_latents, table.shape[1], dtype=torch.float32, device=scale.device)
        for table in (error_NE, x_ND)
    )
    d_b_enc_M = torch.empty(n_latents, dtype=torch.float32, device=scale.device)
    _add_up(pairs, scale, d_W_dec_ME, error_NE, values_S, _Second(d_W_enc_MD, x_ND, d_b_enc_M, dots_S))
    return d_W_dec_ME, d_W_enc_MD, d_b_enc_M


def sum_by_latent(pairs: SortedPairs, table_SD: Tensor, scale: Tensor) -> Tensor:
    """[M, D] float32: ``scale`` times the sum of each latent's rows of ``table``, which has one per entry."""
    out_MD = torch.empty(len(pairs.starts) - 1, table_SD.shape[1], dtype=torch.float32, device=scale.device)
    _add_up(pairs._replace(rows_S=None, k=1), scale, out_MD, table_SD, None, None)
    return out_MD


class _Second(NamedTuple):
    """The second sum of `weight_grads`, beside that over the first table."""

    out_MD: Tensor
    table_ND: Tensor
    total_M: Tensor
    weights_S: Tensor


def _add_up(
    pairs: SortedPairs,
    scale: Tensor,
    out_MD: Tensor,
    table_ND: Tensor,
    weights_S: Tensor | None,
    second: _Second | None,
) -> None:
    (n_latents, d_a), n_extra = out_MD.shape, len(pairs.owner_C)
    d_b = second.out_MD.shape[1] if second else d_a
    unused = pairs.order_S
    extra_CD = torch.empty(n_extra, d_a, dtype=torch.float32, device=out_MD.device)
    second_extra_CD = extra_CD.new_empty(n_extra, d_b) if second else unused
    total_extra_C = torch.empty(n_extra, dtype=torch.float32, device=out_MD.device) if second else unused
    widest = max(d_a, d_b)
    width = triton.next_power_of_2(widest)
    cols = min(width, _COLS)
    _sums[(n_latents + n_extra, triton.cdiv(widest, cols))](
        pairs.order_S,
        pairs.rows_S if pairs.rows_S is not None else unused,
        pairs.starts,
        pairs.extra,
        pairs.owner_C,
        weights_S if weights_S is not None else unused,
        second.weights_S if second else unused,
        scale,
        table_ND,
        out_MD,
        extra_CD,
        second.table_ND if second else unused,
        second.out_MD if second else unused,
        second_extra_CD,
        second.total_M if second else unused,
        total_extra_C,
        n_latents,
        d_a,
        d_b,
        K=pairs.k,
        COLS=cols,
        SIZE=CHUNK,
        RAGGED=pairs.rows_S is not None,
        ALONE=second is None,
        num_warps=1,
    )
    if n_extra:
        _add_chunks[(n_extra,)](
            pairs.extra,
            pairs.owner_C,
            out_MD,
            extra_CD,
            second.out_MD if second else unused,
            second_extra_CD,
            second.total_M if second else unused,
            total_extra_C,
            n_latents,
            d_a,
            d_b,
            D=width,
            ALONE=second is None,
            num_warps=max(1, min(8, width // 256)),
        )
