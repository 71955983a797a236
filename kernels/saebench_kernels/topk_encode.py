"""Encode rows and keep the k largest pre-activations of each.

Shapes: N rows, D = d_in, M = d_sae latents, K kept per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saebench_kernels.dispatch import is_fused
from saebench_kernels.gathered_dots import gathered_dots
from saebench_kernels.rounded import rounded

_CPU_CHUNK_ELEMENTS = 1 << 20
"""Pre-activations computed at once on a CPU: few enough to stay in its cache."""


def topk_encode(
    x_ND: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor, k: int, *, scan_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The k largest of ``relu(x W_enc^T + b_enc)`` in each row.

    x is of any float type, the weights are float32; the scan over all latents is done in ``scan_dtype``. A
    row with fewer than k positive pre-activations is padded with zeros, whose indices mean nothing.

    Fused (see dispatch.py), the selection is exact on the pre-activations of the scan, rounded to its type:
    the largest are kept, of equal ones those with the smaller index, in the order of their indices. The
    values are rounded, and NaN counts as the largest. Eager, a scan that is not in float32 only proposes, and
    the values of the latents picked are computed again in float32; order and ties are unspecified.

    Returns:
        ``values_NK`` float32 and ``indices_NK``, int32 or int64.
    """
    if len(x_ND) and is_fused("topk_encode", x_ND.device, scan_dtype, k=k, d_sae=len(W_enc_MD)):
        from saebench_kernels.fused.scan import scan
        from saebench_kernels.fused.select import select_topk

        scanned = scan(rounded(x_ND, scan_dtype), rounded(W_enc_MD, scan_dtype), b_enc_M)
        return select_topk(scanned, k, len(W_enc_MD))
    return topk_encode_eager(x_ND.float(), W_enc_MD, b_enc_M, k, scan_dtype=scan_dtype)


def topk_encode_eager(
    x_ND: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor, k: int, *, scan_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """``topk_encode`` in plain torch."""
    n_rows, d_sae = x_ND.shape[0], W_enc_MD.shape[0]
    scan_x_ND, scan_W_DM, scan_b_M = x_ND.to(scan_dtype), W_enc_MD.to(scan_dtype).T, b_enc_M.to(scan_dtype)
    chunk = max(1, n_rows if x_ND.is_cuda else min(n_rows, _CPU_CHUNK_ELEMENTS // d_sae))
    pre_nM = torch.empty(chunk, d_sae, dtype=scan_dtype, device=x_ND.device)
    values_NK = torch.empty(n_rows, k, dtype=scan_dtype, device=x_ND.device)
    indices_NK = torch.empty(n_rows, k, dtype=torch.int64, device=x_ND.device)
    for start in range(0, n_rows, chunk):
        rows = slice(start, min(start + chunk, n_rows))
        out_nM = pre_nM[: rows.stop - start]
        torch.addmm(scan_b_M, scan_x_ND[rows], scan_W_DM, out=out_nM)
        torch.topk(out_nM, k, dim=1, sorted=False, out=(values_NK[rows], indices_NK[rows]))
    if scan_dtype != torch.float32:
        starts_N = torch.arange(n_rows, device=x_ND.device) * k
        dots_S = gathered_dots(indices_NK.view(-1), starts_N, x_ND, W_enc_MD)
        values_NK = dots_S.view(n_rows, k) + b_enc_M[indices_NK]
    return values_NK.relu_(), indices_NK
