"""Encode rows and keep the pre-activations above a threshold.

Shapes: N rows, n rows at once, D = d_in, M = d_sae latents, C candidates, S entries kept, row by row.
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


def threshold_encode(
    x_ND: Tensor,
    W_enc_MD: Tensor,
    b_enc_M: Tensor,
    threshold_M: Tensor,
    *,
    scan_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of ``x W_enc^T + b_enc`` that are positive and strictly above their latent's threshold.

    x is of any float type, weights and thresholds are float32; ``threshold`` has shape [M] or () (one for
    all), and may be negative or infinite.

    Fused (see dispatch.py), pre-activations are compared before they are rounded to ``scan_dtype``, and the
    values are rounded. Eager, see ``threshold_encode_eager``.

    Returns:
        ``values_S`` float32, ``indices_S`` int32 or int64, ascending within a row, and ``offsets`` [N + 1]
        int64: where each row begins.
    """
    if len(x_ND) and is_fused("threshold_encode", x_ND.device, scan_dtype, d_sae=len(W_enc_MD)):
        from saebench_kernels.fused.ragged import select_positive
        from saebench_kernels.fused.scan import scan

        floor_M = threshold_M.clamp_min(0).expand(len(W_enc_MD)).contiguous()
        scanned = scan(rounded(x_ND, scan_dtype), rounded(W_enc_MD, scan_dtype), b_enc_M, floor_M=floor_M)
        return select_positive(scanned, len(W_enc_MD))
    return threshold_encode_eager(x_ND.float(), W_enc_MD, b_enc_M, threshold_M, scan_dtype=scan_dtype)


def threshold_encode_eager(
    x_ND: Tensor,
    W_enc_MD: Tensor,
    b_enc_M: Tensor,
    threshold_M: Tensor,
    *,
    scan_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """``threshold_encode`` in plain torch. At most one chunk of rows of the N x M pre-activations is held.

    When ``scan_dtype`` is not float32, the scan only proposes: every entry that may be above its threshold is
    computed again in float32, and compared again. The result does not depend on ``scan_dtype``, up
    to the order in which float32 sums are taken.
    """
    d_sae = W_enc_MD.shape[0]
    floor_M = threshold_M.clamp_min(0).expand(d_sae)
    if scan_dtype == torch.float32:
        values_S, flat_S = _scan(x_ND, W_enc_MD.T, b_enc_M, floor_M.expand(1, d_sae))
        return _by_row(values_S, flat_S, x_ND.shape[0], d_sae)
    _, flat_C = _scan(*_with_slack(x_ND, W_enc_MD, b_enc_M - floor_M, scan_dtype))
    _, indices_C, offsets = _by_row(flat_C, flat_C, x_ND.shape[0], d_sae)
    values_C = gathered_dots(indices_C, offsets[:-1], x_ND, W_enc_MD) + b_enc_M[indices_C]
    kept_C = values_C > floor_M[indices_C]
    return _by_row(values_C[kept_C], flat_C[kept_C], x_ND.shape[0], d_sae)


def _with_slack(
    x_ND: Tensor, W_enc_MD: Tensor, excess_M: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The problem ``x W^T + excess > 0`` for a scan in ``dtype``, with a floor so low that it misses nothing.

    Rows of W are scaled to norm 1, which changes no sign. Rounding both factors then moves a dot product
    by at most eps |x|, and rounding the excess and the result moves each by eps / 2 of itself; eps is the
    spacing of numbers at 1.
    """
    eps = torch.finfo(dtype).eps
    norm_M = W_enc_MD.norm(dim=1)
    scale_M = torch.where(norm_M > 0, norm_M, 1.0).reciprocal()
    excess_M = excess_M * scale_M
    excess_M = excess_M + eps * excess_M.abs().nan_to_num(posinf=0.0)
    floor_N1 = -1.05 * eps * x_ND.norm(dim=1, keepdim=True)
    return x_ND.to(dtype), (W_enc_MD * scale_M[:, None]).to(dtype).T, excess_M.to(dtype), floor_N1


def _scan(x_ND: Tensor, W_enc_DM: Tensor, b_enc_M: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """The entries above ``floor`` ([N, 1] or [1, M]): values and flat indices n M + m, ascending."""
    n_rows, d_sae = x_ND.shape[0], W_enc_DM.shape[1]
    limit = _CUDA_CHUNK_ELEMENTS if x_ND.is_cuda else _CPU_CHUNK_ELEMENTS
    chunk = max(1, min(n_rows, limit // d_sae))
    pre_nM = x_ND.new_empty(chunk, d_sae)
    values, flats = [x_ND.new_empty(0)], [torch.empty(0, dtype=torch.int64, device=x_ND.device)]
    for start in range(0, n_rows, chunk):
        rows_nD = x_ND[start : start + chunk]
        out_nM = pre_nM[: rows_nD.shape[0]]
        torch.addmm(b_enc_M, rows_nD, W_enc_DM, out=out_nM)
        floor_n = floor[start : start + chunk] if floor.shape[1] == 1 else floor
        flat_s = (out_nM > floor_n).view(-1).nonzero()[:, 0]
        values.append(out_nM.view(-1)[flat_s])
        flats.append(flat_s + start * d_sae)
    return torch.cat(values), torch.cat(flats)


def _by_row(values_S: Tensor, flat_S: Tensor, n_rows: int, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    bounds = torch.arange(n_rows + 1, device=flat_S.device) * d_sae
    return values_S, flat_S % d_sae, torch.searchsorted(flat_S, bounds)
