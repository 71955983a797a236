"""Both weight gradients of sparse codes from one sorted list of active pairs, without atomics.

One warp owns a piece of a row of the gradient and adds up the tokens in which its latent is active, one
after the other and always in the same order. A latent of many tokens is cut into chunks: the first is its
row's program, the others have programs of their own whose sums are added afterwards, again in order.

Shapes: N rows, D = d_in, M = d_sae latents, S sorted pairs (latent, row), E chunks beyond the first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 128
"""Pairs that one program adds up."""
_COLS = 256
"""Columns that a warp has: 16 bytes a thread of half-precision rows. Wider or with more pairs at once it is
slower by a quarter to twice (S1 and S2 on an H100)."""


class SortedPairs(NamedTuple):
    """The entries of a batch sorted by latent, and how they are cut into chunks."""

    order_S: Tensor
    """Place of each sorted entry among the entries as they were, int64."""
    rows_S: Tensor
    """Row of each sorted entry, int32."""
    starts: Tensor
    """[M + 1] int32: where each latent's entries begin."""
    extra: Tensor
    """[M + 1] int32: where each latent's chunks beyond the first begin among all of these."""
    owner_E: Tensor
    """Latent of each chunk beyond the first, int32; M where there is none."""


def sort_pairs(indices_S: Tensor, rows_S: Tensor, d_sae: int) -> SortedPairs:
    """Sort entries by latent; stable, so that sums repeat bit for bit. Waits for nothing."""
    device = indices_S.device
    latents_S, order_S = torch.sort(indices_S, stable=True)
    bounds = torch.arange(d_sae + 1, device=device, dtype=indices_S.dtype)
    starts = torch.searchsorted(latents_S, bounds, out_int32=True)
    extra = torch.zeros(d_sae + 1, dtype=torch.int32, device=device)
    n_extra_M = (starts.diff() - 1).clamp_min(0) // CHUNK
    torch.cumsum(n_extra_M, 0, dtype=torch.int32, out=extra[1:])
    chunks_E = torch.arange(len(indices_S) // CHUNK, device=device, dtype=torch.int32)
    owner_E = torch.searchsorted(extra[1:], chunks_E, right=True, out_int32=True)
    return SortedPairs(order_S, rows_S.to(torch.int32)[order_S], starts, extra, owner_E)


@triton.jit
def _sums(
    order, rows, starts, extra, owner,
    a_weights, a_table, a_out, a_extra, a_scale,
    b_weights, b_table, b_out, b_extra, total_out, total_extra,
    n_latents, d_in,
    COLS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = cols < d_in
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
            entry = tl.load(order + at)
            place = tl.load(rows + at).to(tl.int64) * d_in + cols
            b_weight = tl.load(b_weights + entry)
            a += tl.load(a_weights + entry) * tl.load(a_table + place, mask=inside, other=0.0).to(tl.float32)
            b += b_weight * tl.load(b_table + place, mask=inside, other=0.0).to(tl.float32)
            total += b_weight
        a *= tl.load(a_scale)
        if program < n_latents:
            tl.store(a_out + latent.to(tl.int64) * d_in + cols, a, mask=inside)
            tl.store(b_out + latent.to(tl.int64) * d_in + cols, b, mask=inside)
            if tl.program_id(1) == 0:
                tl.store(total_out + latent, total)
        else:
            other = (program - n_latents).to(tl.int64)
            tl.store(a_extra + other * d_in + cols, a, mask=inside)
            tl.store(b_extra + other * d_in + cols, b, mask=inside)
            if tl.program_id(1) == 0:
                tl.store(total_extra + other, total)


@triton.jit
def _add_chunks(
    extra, owner, a_out, a_extra, b_out, b_extra, total_out, total_extra, n_latents, d_in, D: tl.constexpr
):
    chunk = tl.program_id(0)
    latent = tl.load(owner + chunk)
    if latent < n_latents:
        first = tl.load(extra + latent)
        if first == chunk:
            cols = tl.arange(0, D)
            inside = cols < d_in
            place = latent.to(tl.int64) * d_in + cols
            a = tl.load(a_out + place, mask=inside, other=0.0)
            b = tl.load(b_out + place, mask=inside, other=0.0)
            total = tl.load(total_out + latent)
            for other in tl.range(first, tl.load(extra + latent + 1)):
                at = other.to(tl.int64) * d_in + cols
                a += tl.load(a_extra + at, mask=inside, other=0.0)
                b += tl.load(b_extra + at, mask=inside, other=0.0)
                total += tl.load(total_extra + other)
            tl.store(a_out + place, a, mask=inside)
            tl.store(b_out + place, b, mask=inside)
            tl.store(total_out + latent, total)


def weight_grads(
    pairs: SortedPairs,
    dec_weights_S: Tensor,
    dec_table_ND: Tensor,
    dec_scale: Tensor,
    enc_weights_S: Tensor,
    enc_table_ND: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """For each latent m, over its pairs (n, m) with entry s:

    ``d_W_dec[m] = dec_scale * sum dec_weights[s] dec_table[n]``, ``d_W_enc[m] = sum enc_weights[s]
    enc_table[n]`` and ``d_b_enc[m] = sum enc_weights[s]``, all float32. ``dec_scale`` is a scalar tensor.
    """
    d_in, n_latents, n_extra = dec_table_ND.shape[1], len(pairs.starts) - 1, len(pairs.owner_E)
    device = dec_table_ND.device
    d_W_dec_MD = torch.empty(n_latents, d_in, dtype=torch.float32, device=device)
    d_W_enc_MD = torch.empty_like(d_W_dec_MD)
    d_b_enc_M = torch.empty(n_latents, dtype=torch.float32, device=device)
    dec_extra_ED = torch.empty(n_extra, d_in, dtype=torch.float32, device=device)
    enc_extra_ED = torch.empty_like(dec_extra_ED)
    b_extra_E = torch.empty(n_extra, dtype=torch.float32, device=device)
    width = triton.next_power_of_2(d_in)
    cols = min(width, _COLS)
    warps = max(1, min(8, width // 256))
    _sums[(n_latents + n_extra, triton.cdiv(d_in, cols))](
        pairs.order_S,
        pairs.rows_S,
        pairs.starts,
        pairs.extra,
        pairs.owner_E,
        dec_weights_S,
        dec_table_ND,
        d_W_dec_MD,
        dec_extra_ED,
        dec_scale,
        enc_weights_S,
        enc_table_ND,
        d_W_enc_MD,
        enc_extra_ED,
        d_b_enc_M,
        b_extra_E,
        n_latents,
        d_in,
        COLS=cols,
        SIZE=CHUNK,
        num_warps=1,
    )
    if n_extra:
        _add_chunks[(n_extra,)](
            pairs.extra,
            pairs.owner_E,
            d_W_dec_MD,
            dec_extra_ED,
            d_W_enc_MD,
            enc_extra_ED,
            d_b_enc_M,
            b_extra_E,
            n_latents,
            d_in,
            D=width,
            num_warps=warps,
        )
    return d_W_dec_MD, d_W_enc_MD, d_b_enc_M
