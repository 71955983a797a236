"""Encode rows and keep the largest pre-activations of the whole batch.

Shapes: N rows, D = d_in, M = d_sae latents, C candidates, S entries kept, row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saebench_kernels.dispatch import is_fused
from saebench_kernels.gathered_dots import gathered_dots
from saebench_kernels.rounded import rounded

_CPU_CHUNK_ELEMENTS = 1 << 20
"""Pre-activations computed at once on a CPU: few enough to stay in its cache."""
_CUDA_CHUNK_ELEMENTS = 1 << 26
_SLACK = {torch.float32: 0.0, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}
"""Share of the threshold by which an entry of a low-precision scan may miss it and still be computed again.

Twice the error of a scan: rounding the result costs up to 2^-8 of it in bfloat16, and rounding the factors
about as much as a standard deviation / 512 of pre-activations, of which a threshold is at least one or two.
"""


def mutual_choice_encode(
    x_ND: Tensor,
    W_enc_MD: Tensor,
    b_enc_M: Tensor,
    budget: int,
    hint: Tensor,
    *,
    scan_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``budget`` (at least 1) largest of the N x M entries of ``relu(x W_enc^T + b_enc)``.

    x is of any float type, the weights and ``hint`` are float32; the scan is done in ``scan_dtype``. Exactly
    ``budget`` entries are kept, or all positive ones when there are fewer. Of equal values at the border
    those with the smaller flat index n M + m are kept.

    ``hint`` (scalar tensor) is a guess a little below the smallest value that will be kept. A good one saves
    time; the result does not depend on it.

    Fused (see dispatch.py), the selection is exact on the pre-activations of the scan, rounded to its type,
    and nothing waits for the GPU: the output has ``budget`` entries, and unused ones belong to no row and are
    zero. NaN counts as the largest. Eager, see ``mutual_choice_encode_eager``.

    Returns:
        ``values_S`` float32, ``indices_S`` int32 or int64, ascending within a row, and ``offsets`` [N + 1]
        int64: where each row begins.
    """
    if len(x_ND) and is_fused("mutual_choice_encode", x_ND.device, scan_dtype, d_sae=len(W_enc_MD)):
        from saebench_kernels.fused.ragged import select_largest
        from saebench_kernels.fused.scan import scan

        scanned = scan(rounded(x_ND, scan_dtype), rounded(W_enc_MD, scan_dtype), b_enc_M)
        return select_largest(scanned, budget, hint, len(W_enc_MD))
    return mutual_choice_encode_eager(x_ND.float(), W_enc_MD, b_enc_M, budget, hint, scan_dtype=scan_dtype)


def mutual_choice_encode_eager(
    x_ND: Tensor,
    W_enc_MD: Tensor,
    b_enc_M: Tensor,
    budget: int,
    hint: Tensor,
    *,
    scan_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """``mutual_choice_encode`` in plain torch; NaN is never kept.

    One scan, in chunks of rows, gathers what exceeds the hint; when that is less than the budget, a second
    scan gathers what is positive. Neither holds all N x M pre-activations, and candidates that can no longer
    be kept are dropped on the way.

    When ``scan_dtype`` is not float32 the scan only proposes: all entries within 3% (bfloat16) of the
    scan's own threshold are computed again in float32, and of these exact values the largest are kept. An
    entry is wrongly left out only if the error of the scan exceeds half of that.
    """
    d_sae = W_enc_MD.shape[0]
    problem = x_ND.to(scan_dtype), W_enc_MD.to(scan_dtype).T, b_enc_M.to(scan_dtype)
    hint = hint.to(scan_dtype)
    values_C, flat_C, floor = _scan(*problem, budget, hint)
    if values_C.numel() < budget or not floor >= hint:
        values_C, flat_C, _ = _scan(*problem, budget, torch.zeros_like(hint))
    bounds = torch.arange(x_ND.shape[0] + 1, device=x_ND.device) * d_sae
    if scan_dtype != torch.float32:
        indices_C, starts_N = flat_C % d_sae, torch.searchsorted(flat_C, bounds)[:-1]
        values_C = gathered_dots(indices_C, starts_N, x_ND, W_enc_MD) + b_enc_M[indices_C]
        positive_C = values_C > 0
        values_C, flat_C = values_C[positive_C], flat_C[positive_C]
        if values_C.numel() > budget:
            kept_C = _largest(values_C, _smallest_kept(values_C, budget), budget)
            values_C, flat_C = values_C[kept_C], flat_C[kept_C]
    return values_C, flat_C % d_sae, torch.searchsorted(flat_C, bounds)


def _scan(
    x_ND: Tensor, W_enc_DM: Tensor, b_enc_M: Tensor, budget: int, floor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates among the entries above ``floor`` (at least 0): value and flat index, in flat order.

    In float32 these are the ``budget`` largest; in lower precision, also those within the slack. The floor
    returned is what entries had to exceed in the end.
    """
    n_rows, d_sae = x_ND.shape[0], W_enc_DM.shape[1]
    limit = _CUDA_CHUNK_ELEMENTS if x_ND.is_cuda else _CPU_CHUNK_ELEMENTS
    chunk = max(1, min(n_rows, limit // d_sae))
    pre_nM = x_ND.new_empty(chunk, d_sae)
    floor = floor.clamp_min(0)
    values_C, flat_C = x_ND.new_empty(0), torch.empty(0, dtype=torch.int64, device=x_ND.device)
    found: list[tuple[Tensor, Tensor]] = []
    n_found = 0
    for start in range(0, n_rows, chunk):
        rows_nD = x_ND[start : start + chunk]
        out_nM = pre_nM[: rows_nD.shape[0]]
        torch.addmm(b_enc_M, rows_nD, W_enc_DM, out=out_nM)
        flat_c = (out_nM > floor).view(-1).nonzero()[:, 0]
        found.append((out_nM.view(-1)[flat_c], flat_c + start * d_sae))
        n_found += flat_c.numel()
        last = start + chunk >= n_rows
        if last or n_found > 2 * budget:
            values_C = torch.cat([values_C, *(values for values, _ in found)])
            flat_C = torch.cat([flat_C, *(flat for _, flat in found)])
            found = []
            if values_C.numel() >= budget:
                values_C, flat_C, floor = _drop_beaten(values_C, flat_C, budget)
            n_found = values_C.numel()
    return values_C, flat_C, floor


def _drop_beaten(values_C: Tensor, flat_C: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """Drop the candidates that cannot be kept; also returns the floor that later candidates must exceed."""
    smallest = _smallest_kept(values_C, budget)
    slack = _SLACK[values_C.dtype]
    floor = smallest * (1 - slack)
    kept_C = values_C > floor if slack else _largest(values_C, smallest, budget)
    return values_C[kept_C], flat_C[kept_C], floor


def _smallest_kept(values_C: Tensor, budget: int) -> Tensor:
    """The ``budget``-th largest value."""
    return values_C.topk(budget, sorted=False).values.min()


def _largest(values_C: Tensor, smallest: Tensor, budget: int) -> Tensor:
    """Mask of the ``budget`` largest, the first of equals, when ``smallest`` is the last value kept."""
    above_C = values_C > smallest
    equal_C = values_C == smallest
    return above_C | (equal_C & (equal_C.cumsum(0) <= budget - above_C.sum()))
