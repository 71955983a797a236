"""Select, for each latent, its largest pre-activations, by a scan with rows and latents exchanged.

The pre-activations of a latent are then contiguous, and one program holds all of them.

Shapes: N rows, Q = N rounded up, D = d_in, M = d_sae latents, S entries kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saebench_kernels.fused.scan import Tiles, scan
from saebench_kernels.fused.select import ALL_BITS, KEYS, kth_largest, order_keys

_EXTRA = 8
"""Columns added to both factors: two hold the bias, and eight keep rows aligned for wide loads."""


@triton.jit
def _kept(score, budgets, n_padded, n_rows, WIDTH: tl.constexpr, ALL: tl.constexpr):
    """Which rows the program's latent keeps: the positive ones among its largest; of equal ones the first."""
    latent = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, WIDTH)
    inside = rows < n_rows
    keys = order_keys(tl.load(score + latent * n_padded + rows, mask=inside, other=0), ALL)
    budget = tl.load(budgets + latent)
    last = kth_largest(keys, tl.full((), 1, tl.int32), tl.full((), ALL + 1, tl.int32), budget)
    spare = budget - tl.sum((keys > last).to(tl.int32))
    equal = (keys == last).to(tl.int32)
    return (keys > last) | ((keys == last) & (tl.cumsum(equal, 0) <= spare)), rows, latent


@triton.jit
def _count_kept(score, budgets, counts, n_padded, n_rows, WIDTH: tl.constexpr, ALL: tl.constexpr):
    kept, _, latent = _kept(score, budgets, n_padded, n_rows, WIDTH, ALL)
    tl.store(counts + latent, tl.sum(kept.to(tl.int32)))


@triton.jit
def _emit_kept(
    score, pre, budgets, starts, values, entry_rows, latents, n_padded, n_rows,
    WIDTH: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    kept, rows, latent = _kept(score, budgets, n_padded, n_rows, WIDTH, ALL)
    place = tl.load(starts + latent) + tl.cumsum(kept.to(tl.int32), 0) - 1
    z = tl.load(pre + latent * n_padded + rows, mask=kept, other=0.0)
    tl.store(values + place, z.to(tl.float32), mask=kept)
    tl.store(entry_rows + place, rows, mask=kept)
    tl.store(latents + place, latent.to(tl.int32) + tl.zeros_like(rows), mask=kept)


def select_by_latent(
    x_ND: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor, budgets_M: Tensor, *, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``budgets[m]`` largest positive entries of each column m of ``relu(x W_enc^T + b_enc)``.

    x and the weights are of one half-precision type, b_enc float32 (taken in two parts of that type).
    Waits for the GPU once, to read their number.

    Returns:
        ``values_S`` float32, ``indices_S`` int32, ascending within a row, and ``offsets`` [N + 1] int64.
    """
    (n_rows, d_in), d_sae, dtype, device = x_ND.shape, len(W_enc_MD), x_ND.dtype, x_ND.device
    wide_MD = torch.zeros(d_sae, d_in + _EXTRA, dtype=dtype, device=device)
    wide_MD[:, :d_in] = W_enc_MD
    wide_MD[:, d_in] = b_enc_M
    wide_MD[:, d_in + 1] = b_enc_M - wide_MD[:, d_in].float()
    ones_ND = torch.nn.functional.pad(x_ND, (0, 2), value=1.0)
    ones_ND = torch.nn.functional.pad(ones_ND, (0, _EXTRA - 2))
    pre_MQ = scan(wide_MD, ones_ND, torch.zeros(n_rows, device=device), tiles=tiles).pre_NP
    n_padded, width = pre_MQ.shape[1], triton.next_power_of_2(n_rows)
    how = {"WIDTH": width, "ALL": ALL_BITS[KEYS[dtype]], "num_warps": _warps(width)}
    score_MQ, budgets_M = pre_MQ.view(KEYS[dtype]), budgets_M.to(torch.int32)
    counts_M = torch.empty(d_sae, dtype=torch.int32, device=device)
    _count_kept[(d_sae,)](score_MQ, budgets_M, counts_M, n_padded, n_rows, **how)
    ends_M = counts_M.cumsum(0)
    n_entries = int(ends_M[-1])
    values_S = torch.empty(n_entries, dtype=torch.float32, device=device)
    rows_S, latents_S = torch.empty(2, n_entries, dtype=torch.int32, device=device).unbind()
    _emit_kept[(d_sae,)](
        score_MQ, pre_MQ, budgets_M, ends_M - counts_M, values_S, rows_S, latents_S, n_padded, n_rows, **how
    )
    rows_S, order_S = torch.sort(rows_S, stable=True)  # they are in the order of latents already
    bounds = torch.arange(n_rows + 1, dtype=torch.int32, device=device)
    return values_S[order_S], latents_S[order_S], torch.searchsorted(rows_S, bounds)


def _warps(width: int) -> int:
    return max(1, min(16, width // 512))
