"""Matching pursuit by the Gram matrix of the atoms: one program computes all picks of a row.

A matrix product gives the correlations of all rows with all atoms once. Every pick then subtracts its
coefficient times a row of D D^T: one pass over two rows, where a scan would multiply with all atoms again.
Rows are independent, so no program waits for another one. The two largest correlations of a row propose;
their products with the float32 residual decide which is picked, and give its coefficient. The proposals come
from factors of unit norm (rows x / |x|, atoms), so they are in float16: no number exceeds 1 except by
rounding, and float16 is eight times as fine as bfloat16.

The gradient goes through the recursion backwards and restores the residual r_t = r_{t+1} + c_t d_t on the
way. From a = dL/dr_{t+1} follow dL/dd_t = -(a . d_t) r_t - c_t a and dL/dr_t = a - (a . d_t) d_t.

Shapes: N rows (n of them at once), D = d_in, M atoms, P = M rounded up, K picks per row, S = N K.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saebench_kernels.entries import Pursuit
from saebench_kernels.fused.center import column_sums
from saebench_kernels.fused.weight_grads import sort_pairs, sum_by_latent
from saebench_kernels.rounded import rounded

PROPOSAL = torch.float16
_PAD = 128
"""The number of columns of the Gram matrix is a multiple of this, so that rows are aligned for wide loads."""
_SCORES_AT_ONCE = 1 << 29
"""Correlations kept at once: 1 GiB."""


class Blocks(NamedTuple):
    """How a program iterates over a row of correlations."""

    atoms: int
    """Correlations per iteration."""
    warps: int
    cached: int
    """Bytes of correlations that all running programs may hold together, so that they stay in the cache."""


def blocks_of(n_padded: int) -> Blocks:
    """The blocks for a number of atoms, chosen by measurements on an H100 (see NOTES.md)."""
    return Blocks(4096, 16, 40 << 20) if n_padded <= 32_768 else Blocks(8192, 32, 40 << 20)


@triton.jit
def _largest(best, found):
    """The largest of ``best`` and its ``found``; of equal ones the smallest ``found``."""
    value = tl.max(best, 0)
    return value, tl.min(tl.where(best == value, found, 2147483647), 0)


@triton.jit
def _pursue(
    x, norms, atoms, gram, scores, values, indices, residual, tolerance,
    n_rows, d_in, n_atoms, n_padded, k, rounding,
    D: tl.constexpr, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr,
    ABSOLUTE: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, D)
    inside = cols < d_in
    lanes = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    while row < n_rows:
        r = tl.load(x + row * d_in + cols, mask=inside, other=0.0)
        norm = tl.load(norms + row)
        floor = rounding * norm
        own = scores + row * n_padded
        taken = 0.0
        of_picked = gram
        t = 0
        while t < k:
            best = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
            found = tl.zeros((BLOCK,), dtype=tl.int32)
            for start in tl.range(0, n_atoms, BLOCK):
                at = start + lanes
                there = at < n_atoms
                c = tl.load(own + at, mask=there, other=float("-inf"), eviction_policy="evict_last")
                score = c.to(tl.float32)
                if t > 0:
                    overlap = tl.load(of_picked + at, mask=there, other=0.0)
                    score -= taken * overlap.to(tl.float32)
                    tl.store(own + at, score.to(c.dtype), mask=there, eviction_policy="evict_last")
                if ABSOLUTE:
                    score = tl.where(there, tl.abs(score), float("-inf"))
                better = score > best
                best = tl.where(better, score, best)
                found = tl.where(better, at, found)
            _, first = _largest(best, found)
            value, second = _largest(tl.where(found == first, float("-inf"), best), found)
            if value == float("-inf"):
                second = first
            atom = tl.load(atoms + first.to(tl.int64) * d_in + cols, mask=inside, other=0.0)
            other = tl.load(atoms + second.to(tl.int64) * d_in + cols, mask=inside, other=0.0)
            c_first = tl.sum(r * atom)
            c_second = tl.sum(r * other)
            if ABSOLUTE:
                swap = tl.abs(c_second) > tl.abs(c_first)
            else:
                swap = c_second > c_first
            c = tl.where(swap, c_second, c_first)
            pick = tl.where(swap, second, first)
            atom = tl.where(swap, other, atom)
            if ABSOLUTE:
                ended = tl.abs(c) <= floor
            else:
                ended = c <= floor
            if LIMITED:
                ended |= tl.sqrt(tl.sum(r * r)) < tl.load(tolerance)
            if ended:
                t = k
            else:
                tl.store(values + row * k + t, c)
                tl.store(indices + row * k + t, pick)
                r -= c * atom
                taken = c / norm
                of_picked = gram + pick.to(tl.int64) * n_padded
                t += 1
        tl.store(residual + row * d_in + cols, r, mask=inside)
        row += PROGRAMS


def pursue(
    x_ND: Tensor,
    atoms_MD: Tensor,
    k: int,
    *,
    tolerance: Tensor | float,
    absolute: bool,
    rounding: float,
    blocks: Blocks | None = None,
) -> Pursuit:
    """At most ``k`` picks per row; x and the atoms (of unit norm) are float32.

    A row ends when a coefficient is not above ``rounding`` |x|, or |r| is below the ``tolerance``.
    """
    (n_rows, d_in), device = x_ND.shape, x_ND.device
    x_ND, atoms_MD = x_ND.contiguous(), atoms_MD.contiguous()
    low_PD = rounded(atoms_MD, PROPOSAL)
    if len(atoms_MD) % _PAD:
        low_PD = torch.nn.functional.pad(low_PD, (0, 0, 0, -len(atoms_MD) % _PAD))
    n_padded = len(low_PD)
    gram_PP = low_PD @ low_PD.T
    values_NK = torch.zeros(n_rows, k, device=device)
    indices_NK = torch.zeros(n_rows, k, dtype=torch.int32, device=device)
    residual_ND = torch.empty_like(x_ND)
    limited = isinstance(tolerance, Tensor) or tolerance > 0
    if limited and not isinstance(tolerance, Tensor):
        tolerance = torch.full((), tolerance, device=device)
    blocks = blocks or blocks_of(n_padded)
    block = min(blocks.atoms, triton.next_power_of_2(n_padded))
    for start in range(0, n_rows, max(1, _SCORES_AT_ONCE // n_padded)):
        rows = slice(start, min(n_rows, start + max(1, _SCORES_AT_ONCE // n_padded)))
        x_nD = x_ND[rows]
        norm_n1 = torch.linalg.vector_norm(x_nD, dim=1, keepdim=True, dtype=torch.float64).float()
        unit_nD = (x_nD / norm_n1.clamp_min(torch.finfo(torch.float32).tiny)).to(PROPOSAL)
        scores_nP = unit_nD @ low_PD.T
        programs = min(len(x_nD), _programs(device, n_padded, blocks))
        _pursue[(programs,)](
            x_nD,
            norm_n1,
            atoms_MD,
            gram_PP,
            scores_nP,
            values_NK[rows],
            indices_NK[rows],
            residual_ND[rows],
            tolerance if limited else x_nD,
            len(x_nD),
            d_in,
            len(atoms_MD),
            n_padded,
            k,
            rounding,
            D=triton.next_power_of_2(d_in),
            BLOCK=block,
            PROGRAMS=programs,
            ABSOLUTE=absolute,
            LIMITED=limited,
            num_warps=blocks.warps,
        )
    return Pursuit(values_NK, indices_NK, residual_ND)


def _programs(device: torch.device, n_padded: int, blocks: Blocks) -> int:
    """The number of programs that run at once."""
    if device.type != "cuda":
        return 3
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return processors * max(1, min(8, blocks.cached // (processors * n_padded * PROPOSAL.itemsize)))


@triton.jit
def _unwind(
    atoms,
    values,
    indices,
    residual,
    out,
    of_x,
    d_in,
    k,
    D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, D)
    inside = cols < d_in
    r = tl.load(residual + row * d_in + cols, mask=inside, other=0.0)
    a = r
    for back in tl.range(0, k):
        entry = row * k + k - 1 - back
        c = tl.load(values + entry)
        pick = tl.load(indices + entry).to(tl.int64)
        atom = tl.load(atoms + pick * d_in + cols, mask=inside, other=0.0)
        atom = tl.where(c == 0, 0.0, atom)  # the row had ended
        along = tl.sum(a * atom)
        r += c * atom
        change = -(along * r + c * a)
        tl.store(out + entry * d_in + cols, change.to(out.dtype.element_ty), mask=inside)
        a -= along * atom
    tl.store(of_x + row * d_in + cols, a, mask=inside)


def energy_gradients(found: Pursuit, atoms_MD: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``scale / 2 |residual|^2``, summed over all rows, for the atoms and for an origin b.

    The picks are held fixed; b is what was subtracted from every row. What each pick adds to its atom's
    gradient is rounded to bfloat16, the sums are float32 and in a fixed order.

    Returns:
        ``d_atoms_MD`` and ``d_b_D``, float32.
    """
    (n_rows, k), d_in = found.values_NK.shape, found.residual_ND.shape[1]
    atoms_MD = atoms_MD.contiguous()
    changes_SD = torch.empty(n_rows * k, d_in, dtype=torch.bfloat16, device=atoms_MD.device)
    of_x_ND = torch.empty_like(found.residual_ND)
    width = triton.next_power_of_2(d_in)
    _unwind[(n_rows,)](
        atoms_MD,
        found.values_NK,
        found.indices_NK,
        found.residual_ND,
        changes_SD,
        of_x_ND,
        d_in,
        k,
        D=width,
        num_warps=max(1, min(8, width // 256)),
    )
    pairs = sort_pairs(found.indices_NK.view(-1), len(atoms_MD), k=k)
    return sum_by_latent(pairs, changes_SD, scale), column_sums(of_x_ND) * -scale
