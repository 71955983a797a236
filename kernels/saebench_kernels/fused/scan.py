"""The scan of all latents: a matrix product that also stores the maximum of every group of latents.

relu(x W_enc^T + b_enc) is rounded to the type of x and stored once. Whatever selects latents of a row
afterwards reads maxima, and then only the groups that can hold a selected latent. That is exact: if an entry
of the k largest were outside the k groups with the largest maxima, each of those groups would hold an entry
that is at least as large. Groups are runs of neighboring latents, so this also holds in the total order
(value descending, index ascending), and ties are resolved correctly. There are groups of two sizes, one
within the other, so that a selection reads a few hundred numbers three times instead of thousands.

Shapes: N rows, D = d_in, M = d_sae latents, P = M rounded up to whole large groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

GROUP = 16
"""Latents in a small group: a sector of memory (32 bytes) of half-precision numbers."""
LARGE_GROUP = 128


class Tiles(NamedTuple):
    """How the product is divided into tiles."""

    rows: int
    latents: int
    depth: int
    """For numbers of two bytes; half as many for numbers of four bytes."""
    warps: int
    stages: int
    abreast: int
    """Tiles of rows that are processed side by side, to reuse the cache."""


_HOPPER = Tiles(rows=128, latents=256, depth=64, warps=8, stages=4, abreast=32)
_HOPPER_GRADIENT = Tiles(rows=128, latents=256, depth=64, warps=8, stages=3, abreast=32)
_AMPERE = Tiles(rows=128, latents=128, depth=32, warps=8, stages=3, abreast=16)


def tiles_of(device: torch.device, *, gradient: bool = False) -> Tiles:
    """The tiles for a GPU. Those for Hopper were chosen by measurements on an H100 (see NOTES.md).

    Data center GPUs since Hopper have enough shared memory for large tiles; the tiles of others are not
    tuned.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10):
        return _HOPPER_GRADIENT if gradient else _HOPPER
    return _AMPERE


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def scored(z, effect):
    """z (1 + |effect|) of rounded numbers, in float32: the same wherever it is computed from the two."""
    return z.to(tl.float32) * (1 + tl.abs(effect.to(tl.float32)))


@triton.jit
def _finish(
    z, effect, bias, floor, pre, maxima, large, row0, col0, n_rows, d_sae, n_padded,
    ROWS: tl.constexpr, LATENTS: tl.constexpr, TMA: tl.constexpr, GRADIENT: tl.constexpr, FLOOR: tl.constexpr,
    SIZE: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Apply bias and ReLU or floor, compute scores and maxima, and store the tile."""
    rows = row0 + tl.arange(0, ROWS)
    cols = col0 + tl.arange(0, LATENTS)
    z += tl.load(bias + cols, mask=cols < d_sae, other=0.0)[None, :]
    if FLOOR:
        z = tl.where(z <= tl.load(floor + cols, mask=cols < d_sae, other=0.0)[None, :], 0.0, z)
    else:
        z = tl.where(z <= 0, 0.0, z)
    if GRADIENT:
        at = rows.to(tl.int64)[:, None] * d_sae + cols[None, :]
        inside = (rows < n_rows)[:, None] & (cols < d_sae)[None, :]
        kept = scored(z.to(maxima.dtype.element_ty), tl.load(effect + at, mask=inside, other=0.0))
    else:
        kept = z
    # Rounding keeps the order, so the rounded maximum is the maximum of the rounded.
    best = tl.reduce(tl.reshape(kept, (ROWS, LATENTS // SIZE, SIZE)), 2, _larger)
    groups = col0 // SIZE + tl.arange(0, LATENTS // SIZE)
    at = rows.to(tl.int64)[:, None] * (n_padded // SIZE) + groups[None, :]
    inside = (rows < n_rows)[:, None] & (groups < n_padded // SIZE)[None, :]
    tl.store(maxima + at, best.to(maxima.dtype.element_ty), mask=inside)
    best = tl.reduce(tl.reshape(best, (ROWS, LATENTS // LARGE, LARGE // SIZE)), 2, _larger)
    groups = col0 // LARGE + tl.arange(0, LATENTS // LARGE)
    at = rows.to(tl.int64)[:, None] * (n_padded // LARGE) + groups[None, :]
    inside = (rows < n_rows)[:, None] & (groups < n_padded // LARGE)[None, :]
    tl.store(large + at, best.to(large.dtype.element_ty), mask=inside)
    if TMA:
        pre.store([row0, col0], z.to(pre.dtype))
    else:
        at = rows.to(tl.int64)[:, None] * n_padded + cols[None, :]
        inside = (rows < n_rows)[:, None] & (cols < n_padded)[None, :]
        tl.store(pre + at, z.to(pre.dtype.element_ty), mask=inside)


@triton.jit
def _load(
    x, w, row0, col0, d, n_rows, d_in, d_sae,
    ROWS: tl.constexpr, LATENTS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    if TMA:
        x_tile = x.load([row0, d])
        w_tile = w.load([col0, d])
    else:
        rows = (row0 + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        cols = (col0 + tl.arange(0, LATENTS)).to(tl.int64)[:, None]
        depth = d + tl.arange(0, DEPTH)[None, :]
        x_tile = tl.load(x + rows * d_in + depth, mask=(rows < n_rows) & (depth < d_in), other=0.0)
        w_tile = tl.load(w + cols * d_in + depth, mask=(cols < d_sae) & (depth < d_in), other=0.0)
    return x_tile, w_tile


@triton.jit
def _dot(x_tile, w_tile, out, EXACT: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:
        x_tile = x_tile.to(tl.float32)
        w_tile = w_tile.to(tl.float32)
    if EXACT:
        out = tl.dot(x_tile, w_tile.T, out, input_precision="ieee")
    else:
        out = tl.dot(x_tile, w_tile.T, out)
    return out


@triton.jit
def _scan(
    x, w, effect, bias, floor, pre, maxima, large,
    n_rows, d_in, d_sae, n_padded,
    ROWS: tl.constexpr, LATENTS: tl.constexpr, DEPTH: tl.constexpr, ABREAST: tl.constexpr,
    PROGRAMS: tl.constexpr, TMA: tl.constexpr, EXACT: tl.constexpr,
    GRADIENT: tl.constexpr, FLOOR: tl.constexpr, SIZE: tl.constexpr, LARGE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(n_rows, ROWS)
    col_tiles = tl.cdiv(d_sae, LATENTS)
    # Flattened, so that the loads of the next tile start before this one is finished.
    for tile in tl.range(tl.program_id(0), row_tiles * col_tiles, PROGRAMS, flatten=True):
        band = tile // (ABREAST * col_tiles)
        in_band = min(row_tiles - band * ABREAST, ABREAST)
        row0 = (band * ABREAST + tile % (ABREAST * col_tiles) % in_band) * ROWS
        col0 = tile % (ABREAST * col_tiles) // in_band * LATENTS
        z = tl.zeros((ROWS, LATENTS), dtype=tl.float32)
        for d in tl.range(0, d_in, DEPTH):
            x_tile, w_tile = _load(x, w, row0, col0, d, n_rows, d_in, d_sae, ROWS, LATENTS, DEPTH, TMA)
            z = _dot(x_tile, w_tile, z, EXACT, WIDEN)
        if LATENTS > LARGE:  # in halves, to stage less shared memory for the stores
            z0, z1 = tl.split(tl.permute(tl.reshape(z, (ROWS, 2, LATENTS // 2)), (0, 2, 1)))
            _finish(z0, effect, bias, floor, pre, maxima, large, row0, col0, n_rows, d_sae, n_padded,
                    ROWS, LATENTS // 2, TMA, GRADIENT, FLOOR, SIZE, LARGE)  # fmt: skip
            _finish(z1, effect, bias, floor, pre, maxima, large, row0, col0 + LATENTS // 2, n_rows, d_sae,
                    n_padded, ROWS, LATENTS // 2, TMA, GRADIENT, FLOOR, SIZE, LARGE)  # fmt: skip
        else:
            _finish(z, effect, bias, floor, pre, maxima, large, row0, col0, n_rows, d_sae, n_padded,
                    ROWS, LATENTS, TMA, GRADIENT, FLOOR, SIZE, LARGE)  # fmt: skip


class Scanned(NamedTuple):
    """The result of a scan."""

    pre_NP: Tensor
    """relu(x W^T + b), rounded; 0 at or below the floor where one was given, and beyond latent M."""
    effect_NM: Tensor | None
    """g W_dec^T, rounded, where gradients are given: then z (1 + |effect|) is the score, otherwise z."""
    maxima_NG: Tensor
    """[N, P / 16]: the largest score of every small group."""
    large_NG: Tensor
    """[N, P / 128]: the largest score of every large group."""


def scan(
    x_ND: Tensor,
    W_enc_MD: Tensor,
    b_enc_M: Tensor,
    *,
    floor_M: Tensor | None = None,
    g_ND: Tensor | None = None,
    W_dec_MD: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Scanned:
    """Scan all latents; x, g and the weights are of one type, biases and floors float32.

    With ``g`` and ``W_dec`` the score is z (1 + |g W_dec^T|), the product rounded to the type of g. NaN
    passes through: it is neither at nor below a floor, and it is the largest of its group.
    """
    (n_rows, d_in), d_sae, device = x_ND.shape, len(W_enc_MD), x_ND.device
    x_ND, W_enc_MD = x_ND.contiguous(), W_enc_MD.contiguous()
    tiles = tiles or tiles_of(device, gradient=g_ND is not None)
    # cuBLAS computes the second product: one kernel for both has room for too few stages (see NOTES.md).
    effect_NM = None if g_ND is None or W_dec_MD is None else _product(g_ND, W_dec_MD)
    n_padded = triton.cdiv(d_sae, LARGE_GROUP) * LARGE_GROUP
    pre_NP = torch.empty(n_rows, n_padded, dtype=x_ND.dtype, device=device)
    maxima_NG = torch.empty(n_rows, n_padded // GROUP, dtype=x_ND.dtype, device=device)
    large_NG = torch.empty(n_rows, n_padded // LARGE_GROUP, dtype=x_ND.dtype, device=device)
    depth = tiles.depth * 2 // x_ND.element_size()  # shared memory is limited in bytes
    tma = d_in * x_ND.element_size() % 16 == 0 and _has_tma(device)
    of_x, of_w, of_out = [tiles.rows, depth], [tiles.latents, depth], [tiles.rows, LARGE_GROUP]

    def described(tensor: Tensor | None, block: list[int]) -> Any:
        return TensorDescriptor.from_tensor(tensor, block) if tma and tensor is not None else tensor

    n_tiles = triton.cdiv(n_rows, tiles.rows) * triton.cdiv(d_sae, tiles.latents)
    programs = min(n_tiles, _multiprocessors(device))  # each takes one tile after the other
    _scan[(programs,)](
        described(x_ND, of_x),
        described(W_enc_MD, of_w),
        effect_NM if effect_NM is not None else b_enc_M,
        b_enc_M,
        floor_M if floor_M is not None else b_enc_M,
        described(pre_NP, of_out),
        maxima_NG,
        large_NG,
        n_rows,
        d_in,
        d_sae,
        n_padded,
        ROWS=tiles.rows,
        LATENTS=tiles.latents,
        DEPTH=depth,
        ABREAST=tiles.abreast,
        PROGRAMS=programs,
        TMA=tma,
        EXACT=x_ND.dtype == torch.float32 and not tf32_is_allowed(),
        GRADIENT=g_ND is not None,
        FLOOR=floor_M is not None,
        SIZE=GROUP,
        LARGE=LARGE_GROUP,
        WIDEN=triton.knobs.runtime.interpret,  # the interpreter multiplies bfloat16 as if it were integers
        num_warps=tiles.warps,
        num_stages=min(tiles.stages, 3) if x_ND.dtype == torch.float32 else tiles.stages,  # staged wider
    )
    return Scanned(pre_NP, effect_NM, maxima_NG, large_NG)


def _product(g_ND: Tensor, W_dec_MD: Tensor) -> Tensor:
    """g W_dec^T with float32 sums, rounded once; torch allows cuBLAS to round partial sums, too."""
    allowed = torch.backends.cuda.matmul
    name = f"allow_{'fp16' if g_ND.dtype == torch.float16 else 'bf16'}_reduced_precision_reduction"
    before = getattr(allowed, name)
    setattr(allowed, name, False)
    try:
        return g_ND @ W_dec_MD.T
    finally:
        setattr(allowed, name, before)


def tf32_is_allowed() -> bool:
    """Whether torch allows float32 products of factors rounded to 10 bits; by default it does not."""
    return torch.get_float32_matmul_precision() != "highest"


def _has_tma(device: torch.device) -> bool:
    """Whether the GPU has a tensor memory accelerator; the interpreter emulates one."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
