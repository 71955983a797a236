"""Select the entries of a scan that exceed a threshold, as ragged codes.

For mutual choice the threshold is found first. The numbers above a hint are counted by their bits: they have
two bytes, so there are 2^15 counters. The counters give the smallest number kept, and how many of its equals
are kept. The counts are integers, so their atomic sums do not depend on the order. There are 32 sets of
counters, since most numbers fall on a few dozen of them. If the hint was too high, the numbers below it are
counted, too: that kernel is always launched, and returns at once when it is not needed. Nothing waits for the
GPU, except in `select_positive`.

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
"""Number of keys of half-precision numbers that are not negative."""
_COPIES = 32
"""Sets of counters; with one set, contention takes ten times as long as everything else."""
_BLOCK = 16
"""Groups processed together."""
_KEYS_A_BLOCK = 256
_ROWS_PLACED = 4096
_TRITON_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _members(listed, first, n_listed, d_sae, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """The latents of a row's listed groups, beginning with the group ``first``, and which of them exist."""
    slots = tl.arange(0, BLOCK * SIZE)
    at = first + slots // SIZE
    latents = tl.load(listed + at, mask=at < n_listed, other=0) * SIZE + slots % SIZE
    return latents, (at < n_listed) & (latents < d_sae)


@triton.jit
def _key_of(number, KEY: tl.constexpr, ALL: tl.constexpr):
    """The key of a float32 number: not negative, so that its bits are in order; at least 1."""
    low = tl.maximum(tl.load(number), 0.0).to(KEY)
    return tl.maximum(order_keys(low.to(tl.int16, bitcast=True), ALL), 1)


@triton.jit
def _find(
    score, maxima, large, listed, n_listed, counters, counted, hint,
    budget, n_padded, d_sae,
    LARGE_WIDTH: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, LARGE: tl.constexpr,
    ALL: tl.constexpr, KEY: tl.constexpr, COUNT: tl.constexpr, AGAIN: tl.constexpr, COPIES: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """List the small groups of a row that hold a key of at least the hint's, and COUNT these keys.

    Without COUNT, and AGAIN, those that hold a key above 0; AGAIN only if fewer than ``budget`` were counted,
    and then the keys below the hint's are, since the others have been.
    """
    needed = True
    if AGAIN:
        needed = tl.sum(tl.load(counted + tl.arange(0, COPIES)).to(tl.int64)) < budget
    if needed:
        row = tl.program_id(0).to(tl.int64)
        least = 1
        most = 1 << 30
        if AGAIN:
            most = _key_of(hint, KEY, ALL)
        elif COUNT:
            least = _key_of(hint, KEY, ALL)
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
            total = tl.zeros((BLOCK * SIZE,), dtype=tl.int32)
            own = counters + (row % COPIES) * N
            for start in tl.range(0, n_kept, BLOCK):
                latents, inside = _members(listed + row * n_small, start, n_kept, d_sae, BLOCK, SIZE)
                scores = tl.load(score + row * n_padded + latents, mask=inside, other=0)
                scores = order_keys(scores, ALL)
                found = inside & (scores >= least) & (scores < most)
                tl.atomic_add(own + scores, 1, mask=found, sem="relaxed")
                total += found.to(tl.int32)
            if not AGAIN:
                tl.atomic_add(counted + row % COPIES, tl.sum(total), sem="relaxed")


@triton.jit
def _judge(counters, last, spare, budget, N: tl.constexpr, BLOCK: tl.constexpr):
    """The last key kept, and how many entries of it are; 0 and 0 where all that is positive is kept.

    First in which block of keys it is, then which of the block.
    """
    blocks = tl.arange(0, N // BLOCK)
    within = tl.arange(0, BLOCK)
    keys = blocks[:, None] * BLOCK + within[None, :]
    counts = tl.where(keys > 0, tl.load(counters + keys), 0)  # int64: they count whole batches
    in_block = tl.sum(counts, 1)
    from_block = tl.sum(in_block) - tl.cumsum(in_block, 0) + in_block
    block = tl.maximum(tl.sum((from_block >= budget).to(tl.int32)) - 1, 0)
    after = tl.sum(tl.where(blocks > block, in_block, 0))
    keys = block * BLOCK + within
    counts = tl.where(keys > 0, tl.load(counters + keys), 0)
    from_key = after + tl.sum(counts) - tl.cumsum(counts, 0) + counts
    key = tl.maximum(block * BLOCK + tl.sum((from_key >= budget).to(tl.int32)) - 1, 0)
    above = after + tl.sum(tl.where(keys > key, counts, 0))
    tl.store(last, key)
    tl.store(spare, tl.where(key > 0, budget - above, 0))


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
def _place(above, equal, spare, offsets, n_rows, BLOCK: tl.constexpr):
    """Where each row's entries begin, and (in place of ``equal``) how many of the last key it keeps."""
    left = tl.load(spare).to(tl.int64)
    total = tl.zeros((), dtype=tl.int64)
    tl.store(offsets, total)
    for start in tl.range(0, n_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = rows < n_rows
        n_equal = tl.load(equal + rows, mask=inside, other=0).to(tl.int64)
        before = tl.cumsum(n_equal, 0) - n_equal
        n_kept = tl.minimum(tl.maximum(left - before, 0), n_equal)
        tl.store(equal + rows, n_kept.to(tl.int32), mask=inside)
        n_entries = tl.load(above + rows, mask=inside, other=0).to(tl.int64) + n_kept
        tl.store(offsets + 1 + rows, total + tl.cumsum(n_entries, 0), mask=inside)
        left -= tl.sum(n_equal)
        total += tl.sum(n_entries)


@triton.jit
def _emit(
    score, pre, listed, n_listed, last, n_equal, offsets, values, indices, n_rows, n_padded, d_sae, capacity,
    BLOCK: tl.constexpr, SIZE: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Write a row's entries: all above the last key kept, and the first ``n_equal`` that equal it.

    Together the rows write zeros where no row's entries are.
    """
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, BLOCK * SIZE)
    blank = tl.load(offsets + n_rows) + row * BLOCK * SIZE
    while blank < capacity:
        tl.store(values + blank + slots, 0.0, mask=blank + slots < capacity)
        tl.store(indices + blank + slots, 0, mask=blank + slots < capacity)
        blank += n_rows * BLOCK * SIZE
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
    """The groups of a scan that hold an entry at or above a floor."""

    def __init__(self, scanned: Scanned, d_sae: int) -> None:
        self.scanned, self.d_sae = scanned, d_sae
        (self.n_rows, self.n_padded), self.device = scanned.pre_NP.shape, scanned.pre_NP.device
        self.keys = KEYS[scanned.pre_NP.dtype]
        assert self.keys == torch.int16, "keys of two bytes"
        self.listed_NG = torch.empty(
            self.n_rows, self.n_padded // GROUP, dtype=torch.int32, device=self.device
        )
        self.n_listed_N = torch.empty(self.n_rows, dtype=torch.int32, device=self.device)

    def find(
        self, hint: Tensor | None = None, counters: Tensor | None = None, *, budget: int | None = None
    ) -> None:
        """List the groups with a key above 0; or of at least the hint's, and add these keys to ``counters``.

        With a ``budget`` only if fewer than that were counted: then the groups with a key above 0, and the
        keys that are below the hint's are added. ``counters`` are C sets of K, then C times how many keys.
        """
        unused = self.n_listed_N
        _find[(self.n_rows,)](
            self.scanned.pre_NP.view(self.keys),
            self.scanned.maxima_NG.view(self.keys),
            self.scanned.large_NG.view(self.keys),
            self.listed_NG,
            self.n_listed_N,
            counters if counters is not None else unused,
            counters.view(-1)[_COPIES * N_KEYS :] if counters is not None else unused,
            hint if hint is not None else unused,
            budget or 0,
            self.n_padded,
            self.d_sae,
            LARGE_WIDTH=triton.next_power_of_2(self.n_padded // LARGE_GROUP),
            BLOCK=_BLOCK,
            SIZE=GROUP,
            LARGE=LARGE_GROUP,
            ALL=ALL_BITS[self.keys],
            KEY=_TRITON_TYPES[self.scanned.pre_NP.dtype],
            COUNT=counters is not None,
            AGAIN=budget is not None,
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
        """``values`` float32 and ``indices`` int32 [capacity], zeros beyond the last row's entries."""
        values_S = torch.empty(capacity, dtype=torch.float32, device=self.device)
        indices_S = torch.empty(capacity, dtype=torch.int32, device=self.device)
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
            self.n_rows,
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

    Does not wait for the GPU: the output has exactly ``budget`` entries, and where fewer are positive the
    rest are zeros that belong to no row. NaN counts as the largest. ``hint`` (scalar) is a number a
    little below the smallest one kept; the result does not depend on it.

    Returns:
        ``values_S`` float32, ``indices_S`` int32 and ``offsets`` [N + 1] int64.
    """
    found = _Found(scanned, d_sae)
    device = found.device
    hint = hint.float()
    counters = torch.zeros(_COPIES * (N_KEYS + 1), dtype=torch.int32, device=device)
    found.find(hint, counters)
    found.find(hint, counters, budget=budget)
    last, spare = torch.empty(2, dtype=torch.int32, device=device).unbind()
    counts_K = counters[: _COPIES * N_KEYS].view(_COPIES, N_KEYS).sum(0)
    _judge[(1,)](counts_K, last, spare, budget, N=N_KEYS, BLOCK=_KEYS_A_BLOCK, num_warps=16)
    above_N, equal_N = found.count(last)
    offsets = torch.empty(found.n_rows + 1, dtype=torch.int64, device=device)
    _place[(1,)](above_N, equal_N, spare, offsets, found.n_rows, BLOCK=_ROWS_PLACED, num_warps=16)
    return *found.emit(last, equal_N, offsets, budget), offsets


def select_positive(scanned: Scanned, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """All positive entries of a scan, row by row; waits for the GPU once, to read their number.

    Returns:
        ``values_S`` float32, ``indices_S`` int32 and ``offsets`` [N + 1] int64.
    """
    found = _Found(scanned, d_sae)
    zero = torch.zeros((), dtype=torch.int32, device=found.device)
    found.find()
    above_N, _ = found.count(zero)
    offsets = torch.nn.functional.pad(above_N.cumsum(0), (1, 0))
    return *found.emit(zero, torch.zeros_like(above_N), offsets, int(offsets[-1])), offsets
