"""Scale rows, subtract an offset and change the type in one pass; and sum over rows.

Shapes: N rows, D = d_in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _center(x, offset, out, scale, n, d_in, OFFSET: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    rows = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale
    if OFFSET:
        rows -= tl.load(offset + at % d_in, mask=inside, other=0.0)
    tl.store(out + at, rows.to(out.dtype.element_ty), mask=inside)


def center(x_ND: Tensor, offset_D: Tensor | None, dtype: torch.dtype, *, scale: float = 1.0) -> Tensor:
    """``scale x - offset`` in ``dtype``, computed in float32."""
    x_ND = x_ND.contiguous()
    out_ND = torch.empty(x_ND.shape, dtype=dtype, device=x_ND.device)
    n = x_ND.numel()
    _center[(triton.cdiv(n, _BLOCK),)](
        x_ND,
        offset_D if offset_D is not None else x_ND,
        out_ND,
        scale,
        n,
        x_ND.shape[-1],
        OFFSET=offset_D is not None,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return out_ND


_SUM_ROWS, _SUM_COLS = 128, 128


@triton.jit
def _column_sums(x, out, n_rows, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    tile = tl.load(x + rows[:, None] * n_cols + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + tl.program_id(0) * n_cols + cols, tl.sum(tile, 0), mask=cols < n_cols)


def column_sums(x_NC: Tensor) -> Tensor:
    """[C] float32: the sum over rows, in a fixed order."""
    n_rows, n_cols = x_NC.shape
    pieces = triton.cdiv(n_rows, _SUM_ROWS)
    out_PC = torch.empty(pieces, n_cols, dtype=torch.float32, device=x_NC.device)
    grid = (pieces, triton.cdiv(n_cols, _SUM_COLS))
    _column_sums[grid](x_NC, out_PC, n_rows, n_cols, ROWS=_SUM_ROWS, COLS=_SUM_COLS, num_warps=4)
    return out_PC.sum(0)
