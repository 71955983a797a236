"""Keeping what exceeds a threshold, of a scan: ragged codes, with nothing that waits for the GPU.

For mutual choice the threshold is found first: the numbers above a hint are counted by their bits (two bytes,
so there are 2^15 counters), and the counters say which number is the last one kept and how many of its equals
are. Integers are added up atomically, and their sums do not depend on the order; there are 32 sets of
counters since most numbers fall on a few dozen of them. When the hint was too high, the numbers below it are
counted, too: that kernel is always launched, and mostly finds that it is not needed.

Shapes: N rows, P latents with padding, S entries kept, row by row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saebench_kernels.fused.scan import GROUP, LARGE_GROUP, Scanned
from saebench_kernels.fused.select import ALL_BITS, KEYS, order_keys

N_KEYS = 1 << 15
"""Keys of half-precision numbers that are not negative."""
_COPIES = 32
"""Sets of counters; with one, waiting for each other takes ten times as long as everything else."""
_BLOCK = 16
"""Groups that are looked at together."""


@triton.jit
def _members(listed, first, n_listed, d_sae, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """The latents of a row's listed groups from the first-th on, and which of them there are."""
    slots = tl.arange(0, BLOCK * SIZE)
    at = first + slots // SIZE
    latents = tl.load(listed + at, mask=at < n_listed, other=0) * SIZE + slots % SIZE
    return latents, (at < n_listed) & (latents < d_sae)


@triton.jit
def _find(
    score, maxima, large, listed, n_listed, n_counted, counters, floor, below, wanted,
    n_padded, d_sae,
    LARGE_WIDTH: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, LARGE: tl.constexpr,
    ALL: tl.constexpr, COUNT: tl.constexpr, AGAIN: tl.constexpr, COPIES: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """List the small groups of a row that hold a key of at least ``floor``, and count these keys.

    AGAIN: only if ``wanted``, and then the keys that are below ``below``, since the others are counted.
    """
    needed = True
    if AGAIN:
        needed = tl.load(wanted) != 0
    if needed:
        row = tl.program_id(0).to(tl.int64)
        least = tl.load(floor)
        n_large = n_padded // LARGE
        n_small = n_padded // SIZE
        groups = tl.arange(0, LARGE_WIDTH)
        bests = tl.load(large + row * n_large + groups, mask=groups < n_large, other=0)
        holds = (groups < n_large) & (order_keys(bests, ALL) >= least)
        # Large groups are listed at the end of the row's list: the small ones will never reach that far
        # before the large ones have been read.
        n_found = tl.sum(holds.to(tl.int32))
        tail = listed + row * n_small + n_small - n_large
        tl.store(tail + tl.cumsum(holds.to(tl.int32), 0) - 1, groups, mask=holds)
        tl.debug_barrier()
        n_kept = 0
        for first in tl.range(0, n_found, BLOCK):
            slots = tl.arange(0, BLOCK * (LARGE // SIZE))
            at = first + slots // (LARGE // SIZE)
            small = tl.load(tail + at, mask=at < n_found, other=0) * (LARGE // SIZE) + slots % (LARGE // SIZE)
            keys = tl.load(maxima + row * n_small + small, mask=at < n_found, other=0)
            found = (at < n_found) & (order_keys(keys, ALL) >= least)
            place = n_kept + tl.cumsum(found.to(tl.int32), 0) - 1
            tl.debug_barrier()
            tl.store(listed + row * n_small + place, small, mask=found)
            n_kept += tl.sum(found.to(tl.int32))
        tl.store(n_listed + row, n_kept)
        if COUNT:
            tl.debug_barrier()
            most = 1 << 30
            total = tl.zeros((BLOCK * SIZE,), dtype=tl.int32)
            own = counters + (row % COPIES) * N
            if AGAIN:
                most = tl.load(below)
            for start in tl.range(0, n_kept, BLOCK):
                latents, inside = _members(listed + row * n_small, start, n_kept, d_sae, BLOCK, SIZE)
                scores = tl.load(score + row * n_padded + latents, mask=inside, other=0)
                scores = order_keys(scores, ALL)
                counted = inside & (scores >= least) & (scores < most)
                tl.atomic_add(own + scores, 1, mask=counted, sem="relaxed")
                total += counted.to(tl.int32)
            tl.store(n_counted + row, tl.sum(total))


@triton.jit
def _judge(counters, last, spare, budget, N: tl.constexpr):
    """The last key kept, and how many entries of it are; 0 and 0 where all that is positive is kept."""
    keys = tl.arange(0, N)
    counts = tl.where(
        keys > 0, tl.load(counters + keys), 0
    )  # int64: all positive entries of a batch together
    from_here = tl.sum(counts) - tl.cumsum(counts, 0) + counts
    key = tl.sum((from_here >= budget).to(tl.int32)) - 1
    enough = key > 0
    key = tl.maximum(key, 0)
    above = tl.sum(tl.where(keys > key, counts, 0))
    tl.store(last, key)
    tl.store(spare, tl.where(enough, budget - above, 0))


@triton.jit
def _count(
    score, listed, n_listed, last, n_above, n_equal, n_padded, d_sae,
    BLOCK: tl.constexpr, SIZE: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """How many keys of a row are above the last one kept, and how many equal it."""
    row = tl.program_id(0).to(tl.int64)
    key = tl.load(last)
    n_kept = tl.load(n_listed + row)
    above = tl.zeros((BLOCK * SIZE,), dtype=tl.int32)
    equal = tl.zeros((BLOCK * SIZE,), dtype=tl.int32)
    for first in tl.range(0, n_kept, BLOCK):
        latents, inside = _members(listed + row * (n_padded // SIZE), first, n_kept, d_sae, BLOCK, SIZE)
        keys = order_keys(tl.load(score + row * n_padded + latents, mask=inside, other=0), ALL)
        above += (inside & (keys > key)).to(tl.int32)
        equal += (inside & (keys == key)).to(tl.int32)
    tl.store(n_above + row, tl.sum(above))
    tl.store(n_equal + row, tl.sum(equal))


@triton.jit
def _emit(
    score, pre, listed, n_listed, last, n_equal, offsets, values, indices, n_padded, d_sae, capacity,
    BLOCK: tl.constexpr, SIZE: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Write a row's entries: all above the last key kept, and the first ``n_equal`` that equal it."""
    row = tl.program_id(0).to(tl.int64)
    key = tl.load(last)
    n_kept = tl.load(n_listed + row)
    spare = tl.load(n_equal + row)
    start = tl.load(offsets + row)
    equals = 0
    written = 0
    for first in tl.range(0, n_kept, BLOCK):
        latents, inside = _members(listed + row * (n_padded // SIZE), first, n_kept, d_sae, BLOCK, SIZE)
        keys = order_keys(tl.load(score + row * n_padded + latents, mask=inside, other=0), ALL)
        same = (inside & (keys == key)).to(tl.int32)
        rank = equals + tl.cumsum(same, 0)
        kept = inside & ((keys > key) | ((keys == key) & (rank <= spare)))
        place = start + written + tl.cumsum(kept.to(tl.int32), 0) - 1
        z = tl.load(pre + row * n_padded + latents, mask=kept, other=0.0)
        tl.store(values + place, z.to(tl.float32), mask=kept & (place < capacity))
        tl.store(indices + place, latents, mask=kept & (place < capacity))
        equals += tl.sum(same)
        written += tl.sum(kept.to(tl.int32))


class _Found:
    """The groups of a scan that hold something at or above a floor."""

    def __init__(self, scanned: Scanned, d_sae: int) -> None:
        self.scanned, self.d_sae = scanned, d_sae
        (self.n_rows, self.n_padded), self.device = scanned.pre_NP.shape, scanned.pre_NP.device
        self.keys = KEYS[scanned.pre_NP.dtype]
        assert self.keys == torch.int16, "keys of two bytes"
        self.listed_NG = torch.empty(
            self.n_rows, self.n_padded // GROUP, dtype=torch.int32, device=self.device
        )
        self.n_listed_N = torch.empty(self.n_rows, dtype=torch.int32, device=self.device)
        self.n_counted_N = torch.empty_like(self.n_listed_N)

    def find(
        self,
        floor: Tensor,
        counters: Tensor | None = None,
        *,
        again: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """List the groups with a key of at least ``floor``; add their keys to ``counters``.

        ``again`` = (wanted, below): only if wanted, and only keys below this are added.
        """
        wanted, below = again or (floor, floor)
        _find[(self.n_rows,)](
            self.scanned.pre_NP.view(self.keys),
            self.scanned.maxima_NG.view(self.keys),
            self.scanned.large_NG.view(self.keys),
            self.listed_NG,
            self.n_listed_N,
            self.n_counted_N,
            counters if counters is not None else self.n_listed_N,
            floor,
            below,
            wanted,
            self.n_padded,
            self.d_sae,
            LARGE_WIDTH=triton.next_power_of_2(self.n_padded // LARGE_GROUP),
            BLOCK=_BLOCK,
            SIZE=GROUP,
            LARGE=LARGE_GROUP,
            ALL=ALL_BITS[self.keys],
            COUNT=counters is not None,
            AGAIN=again is not None,
            COPIES=_COPIES,
            N=N_KEYS,
            num_warps=1,
        )

    def count(self, last: Tensor) -> tuple[Tensor, Tensor]:
        """[N] int32 each: keys of a row above ``last``, and equal to it."""
        above_N, equal_N = torch.empty_like(self.n_listed_N), torch.empty_like(self.n_listed_N)
        _count[(self.n_rows,)](
            self.scanned.pre_NP.view(self.keys),
            self.listed_NG,
            self.n_listed_N,
            last,
            above_N,
            equal_N,
            self.n_padded,
            self.d_sae,
            BLOCK=_BLOCK,
            SIZE=GROUP,
            ALL=ALL_BITS[self.keys],
            num_warps=1,
        )
        return above_N, equal_N

    def emit(self, last: Tensor, equal_N: Tensor, offsets: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        """``values`` float32 and ``indices`` int32 [capacity], zeros where nothing was written."""
        values_S = torch.zeros(capacity, dtype=torch.float32, device=self.device)
        indices_S = torch.zeros(capacity, dtype=torch.int32, device=self.device)
        _emit[(self.n_rows,)](
            self.scanned.pre_NP.view(self.keys),
            self.scanned.pre_NP,
            self.listed_NG,
            self.n_listed_N,
            last,
            equal_N,
            offsets,
            values_S,
            indices_S,
            self.n_padded,
            self.d_sae,
            capacity,
            BLOCK=_BLOCK,
            SIZE=GROUP,
            ALL=ALL_BITS[self.keys],
            num_warps=1,
        )
        return values_S, indices_S


def select_largest(scanned: Scanned, budget: int, hint: Tensor, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``budget`` largest positive entries of the whole scan; of equals at the border the first.

    Waits for nothing: the output has room for exactly ``budget`` entries, and where fewer are positive the
    rest is zeros that belong to no row. NaN counts as larger than all. ``hint`` (scalar) is a number a
    little below the smallest one kept; the result does not depend on it.

    Returns:
        ``values_S`` float32, ``indices_S`` int32 and ``offsets`` [N + 1] int64.
    """
    found = _Found(scanned, d_sae)
    device = found.device
    floor = order_key(hint, scanned.pre_NP.dtype).clamp_min(1)
    one = torch.ones((), dtype=torch.int32, device=device)
    counters_CK = torch.zeros(_COPIES, N_KEYS, dtype=torch.int32, device=device)
    found.find(floor, counters_CK)
    wanted = found.n_counted_N.sum() < budget
    found.find(one, counters_CK, again=(wanted.to(torch.int32), floor))
    last, spare = torch.empty(2, dtype=torch.int32, device=device).unbind()
    _judge[(1,)](counters_CK.sum(0), last, spare, budget, N=N_KEYS, num_warps=16)
    above_N, equal_N = found.count(last)
    before_N = equal_N.cumsum(0) - equal_N
    equal_N = torch.minimum((spare - before_N).clamp_min(0), equal_N).to(torch.int32)
    offsets = torch.nn.functional.pad((above_N + equal_N).cumsum(0), (1, 0))
    return *found.emit(last, equal_N, offsets, budget), offsets


def select_positive(scanned: Scanned, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """All positive entries of a scan, row by row; waits for the GPU once, to know how many there are.

    Returns:
        ``values_S`` float32, ``indices_S`` int32 and ``offsets`` [N + 1] int64.
    """
    found = _Found(scanned, d_sae)
    zero = torch.zeros((), dtype=torch.int32, device=found.device)
    found.find(zero + 1)
    above_N, _ = found.count(zero)
    offsets = torch.nn.functional.pad(above_N.cumsum(0), (1, 0))
    return *found.emit(zero, torch.zeros_like(above_N), offsets, int(offsets[-1])), offsets


def order_key(number: Tensor, dtype: torch.dtype) -> Tensor:
    """Scalar int32: the key of a number that is not negative, rounded to ``dtype``."""
    return number.clamp_min(0).to(dtype).view(KEYS[dtype]).to(torch.int32)
