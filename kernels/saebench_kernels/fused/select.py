"""Select the k largest scores of every row from the result of a scan.

Numbers that are not negative are ordered as their bits are, so the k-th largest is found by bisection over
integers. Of equal scores the one with the smaller index is selected. One warp processes a row: it selects the
k best large groups, the k best small groups in these, and the k best latents in those.

Shapes: N rows, P latents with padding, K kept per row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saebench_kernels.fused.scan import GROUP, LARGE_GROUP, Scanned, scored

KEYS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
"""The integers by which numbers of a type are compared."""
_WIDEST = 32_768
"""Largest number of keys of a row that one program holds."""
ALL_BITS = {torch.int16: 0x7FFF, torch.int32: 0x7FFFFFFF}
"""Every bit but the sign."""


@triton.jit
def kth_largest(keys, least, most, k):
    """The k-th largest of the keys, which is in [least, most); ``least`` if fewer than k reach it."""
    while most - least > 1:
        middle = least + (most - least) // 2
        enough = tl.sum((keys >= middle).to(tl.int32)) >= k
        least = tl.where(enough, middle, least)
        most = tl.where(enough, most, middle)
    return least


@triton.jit
def places(keys, least, k):
    """The output position of each key that is among the k largest, in the order of the keys; otherwise -1.

    Of keys that equal the k-th largest, the first are taken.
    """
    above = (keys > least).to(tl.int32)
    equal = (keys == least).to(tl.int32)
    spare = k - tl.sum(above)
    before = tl.cumsum((above << 16) | equal, 0)  # both counts in one scan; a row has less than 2^15 keys
    n_equal = before & 0xFFFF
    taken = (above > 0) | ((equal > 0) & (n_equal <= spare))
    return tl.where(taken, (before >> 16) + tl.minimum(n_equal, spare) - 1, -1)


@triton.jit
def order_keys(numbers, ALL: tl.constexpr):
    """Integers in the order of numbers that are not negative; NaN of either sign is above infinity."""
    return tl.minimum(numbers.to(tl.int32) & ALL, ALL - 1)


@triton.jit
def _members(
    maxima, chosen, row, n, n_chosen, most, ALL: tl.constexpr, WIDTH: tl.constexpr, RATIO: tl.constexpr
):
    """The members of a row's chosen groups: their indices and keys, -1 where there is none."""
    slots = tl.arange(0, WIDTH)
    inside = slots // RATIO < n_chosen
    members = tl.load(chosen + slots // RATIO, mask=inside, other=0) * RATIO + slots % RATIO
    inside &= members < most
    keys = order_keys(tl.load(maxima + row * n + members, mask=inside, other=0), ALL)
    return members, tl.where(inside, keys, -1)


@triton.jit
def _select(
    pre, effect, maxima, large, chosen, values, indices, d_sae, n_padded, k,
    LARGE_WIDTH: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, LARGE: tl.constexpr,
    ALL: tl.constexpr, SCORED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n_large = n_padded // LARGE
    n_small = n_padded // SIZE
    groups = tl.arange(0, LARGE_WIDTH)
    keys = order_keys(tl.load(large + row * n_large + groups, mask=groups < n_large, other=0), ALL)
    keys = tl.where(groups < n_large, keys, -1)
    most = tl.max(keys) + 1
    n_chosen = min(k, n_large)
    least = kth_largest(keys, most * 0, most, n_chosen)
    at = places(keys, least, n_chosen)
    tl.store(chosen + row * k + at, groups, mask=at >= 0)
    tl.debug_barrier()
    groups, keys = _members(
        maxima, chosen + row * k, row, n_small, n_chosen, n_small, ALL, K * (LARGE // SIZE), LARGE // SIZE
    )
    least = tl.where(n_chosen < k, 0, least)  # k chosen groups have k members that are no less than this
    n_chosen = min(k, n_small)
    least = kth_largest(keys, least, most, n_chosen)
    at = places(keys, least, n_chosen)
    tl.debug_barrier()
    tl.store(chosen + row * k + at, groups, mask=at >= 0)
    tl.debug_barrier()
    slots = tl.arange(0, K * SIZE)
    inside = slots // SIZE < n_chosen
    latents = tl.load(chosen + row * k + slots // SIZE, mask=inside, other=0) * SIZE + slots % SIZE
    inside &= latents < d_sae
    z = tl.load(pre + row * n_padded + latents, mask=inside, other=0.0)
    score = z
    if SCORED:
        # As the scan computed the maxima, so that equal numbers have equal keys.
        score = scored(z, tl.load(effect + row * d_sae + latents, mask=inside, other=0.0)).to(z.dtype)
    keys = tl.where(inside, order_keys(score.to(maxima.dtype.element_ty, bitcast=True), ALL), -1)
    least = kth_largest(keys, tl.where(n_chosen < k, 0, least), most, k)
    at = places(keys, least, k)
    tl.store(values + row * k + at, z.to(tl.float32), mask=at >= 0)
    tl.store(indices + row * k + at, latents, mask=at >= 0)


def select_topk(scanned: Scanned, k: int, d_sae: int) -> tuple[Tensor, Tensor]:
    """``values_NK`` float32 and ``indices_NK`` int32, ascending by index: exactly the k best of each row.

    Best by score descending, then index ascending; NaN counts as the largest. A row with fewer than k
    positive entries is padded with zeros.
    """
    pre_NP, effect_NM, maxima_NG, large_NG = scanned
    n_rows, n_padded = pre_NP.shape
    keys = KEYS[pre_NP.dtype]
    chosen_NK = torch.empty(n_rows, k, dtype=torch.int32, device=pre_NP.device)
    values_NK = torch.empty(n_rows, k, dtype=torch.float32, device=pre_NP.device)
    indices_NK = torch.empty_like(chosen_NK)
    width, slots = triton.next_power_of_2(large_NG.shape[1]), triton.next_power_of_2(k)
    _select[(n_rows,)](
        pre_NP,
        effect_NM if effect_NM is not None else pre_NP,
        maxima_NG.view(keys),
        large_NG.view(keys),
        chosen_NK,
        values_NK,
        indices_NK,
        d_sae,
        n_padded,
        k,
        LARGE_WIDTH=width,
        K=slots,
        SIZE=GROUP,
        LARGE=LARGE_GROUP,
        ALL=ALL_BITS[keys],
        SCORED=effect_NM is not None,
        num_warps=min(8, max(1, max(width, slots * GROUP) // 1024)),
    )
    return values_NK, indices_NK


@triton.jit
def _keep(pre, keys_of, n_columns, k, WIDTH: tl.constexpr, ALL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, WIDTH)
    inside = cols < n_columns
    at = row * n_columns + cols
    keys = tl.where(inside, order_keys(tl.load(keys_of + at, mask=inside, other=0), ALL), -1)
    most = tl.max(keys) + 1
    kept = places(keys, kth_largest(keys, most * 0, most, k), k) >= 0
    tl.store(pre + at, 0.0, mask=inside & (kept == 0))


def keep_topk(pre_NA: Tensor, k: int) -> None:
    """Set all but the k largest numbers of each row to 0, in place; no number may be negative.

    Of equal numbers at the border, the first are kept, or any of them in rows of more than 32,768 columns.
    """
    n_rows, n_columns = pre_NA.shape
    if n_columns > _WIDEST:
        top = pre_NA.topk(k, dim=1, sorted=False)
        pre_NA.zero_().scatter_(1, top.indices, top.values)
        return
    keys = KEYS[pre_NA.dtype]
    width = triton.next_power_of_2(n_columns)
    warps = min(16, max(1, width // 1024))
    _keep[(n_rows,)](
        pre_NA, pre_NA.view(keys), n_columns, k, WIDTH=width, ALL=ALL_BITS[keys], num_warps=warps
    )
