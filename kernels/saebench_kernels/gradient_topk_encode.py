"""Encode rows and keep, per row, the k latents with the largest value times influence.

Shapes: N rows, D = d_in, M = d_sae latents, K kept per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saebench_kernels.dispatch import is_fused
from saebench_kernels.gathered_dots import gathered_dots
from saebench_kernels.rounded import rounded

_CPU_CHUNK_ELEMENTS = 1 << 20
"""Scores computed at once on a CPU: few enough to stay in its cache."""


def gradient_topk_encode(
    x_ND: Tensor,
    g_ND: Tensor,
    W_enc_MD: Tensor,
    W_dec_MD: Tensor,
    b_enc_M: Tensor,
    k: int,
    weight: Tensor | float,
    *,
    scan_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """``z = relu(x W_enc^T + b_enc)`` at the k largest of ``z (1 + weight |g W_dec^T|)`` in each row.

    x and g are of any float type, the weights are float32; the scan over all latents is done in
    ``scan_dtype``. The score multiplies z, so a latent of z = 0 is never picked ahead of a positive one: a
    row with fewer than k positive latents is padded with zeros, whose indices mean nothing.

    Fused (see dispatch.py), the selection is exact on the scores of the scan, rounded to ``scan_dtype``: the
    largest are kept, of equal ones those with the smaller index. Eager, a scan that is not in float32 only
    proposes, and the values are computed again in float32; order and ties are unspecified.

    Returns:
        ``values_NK`` float32 (z, not the score) and ``indices_NK``, int32 or int64.
    """
    if len(x_ND) and is_fused("gradient_topk_encode", x_ND.device, scan_dtype, k=k, d_sae=len(W_enc_MD)):
        from saebench_kernels.fused.scan import scan
        from saebench_kernels.fused.select import select_topk

        scanned = scan(
            rounded(x_ND, scan_dtype),
            rounded(W_enc_MD, scan_dtype),
            b_enc_M,
            g_ND=rounded(g_ND * weight, scan_dtype),
            W_dec_MD=rounded(W_dec_MD, scan_dtype),
        )
        return select_topk(scanned, k, len(W_enc_MD))
    return gradient_topk_encode_eager(
        x_ND.float(), g_ND.float(), W_enc_MD, W_dec_MD, b_enc_M, k, weight, scan_dtype=scan_dtype
    )


def gradient_topk_encode_eager(
    x_ND: Tensor,
    g_ND: Tensor,
    W_enc_MD: Tensor,
    W_dec_MD: Tensor,
    b_enc_M: Tensor,
    k: int,
    weight: Tensor | float,
    *,
    scan_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """``gradient_topk_encode`` in plain torch."""
    n_rows, d_sae = x_ND.shape[0], W_enc_MD.shape[0]
    scan_x_ND, scan_W_enc_DM, scan_b_M = (
        x_ND.to(scan_dtype),
        W_enc_MD.to(scan_dtype).T,
        b_enc_M.to(scan_dtype),
    )
    scan_g_ND, scan_W_dec_DM = (g_ND * weight).to(scan_dtype), W_dec_MD.to(scan_dtype).T
    chunk = max(1, n_rows if x_ND.is_cuda else min(n_rows, _CPU_CHUNK_ELEMENTS // d_sae))
    buffer_nM = torch.empty(chunk, d_sae, dtype=scan_dtype, device=x_ND.device)
    score_nM = torch.empty_like(buffer_nM)
    values_NK = torch.empty(n_rows, k, dtype=scan_dtype, device=x_ND.device)
    indices_NK = torch.empty(n_rows, k, dtype=torch.int64, device=x_ND.device)
    for start in range(0, n_rows, chunk):
        rows = slice(start, min(start + chunk, n_rows))
        z_nM, out_nM = buffer_nM[: rows.stop - start], score_nM[: rows.stop - start]
        torch.addmm(scan_b_M, scan_x_ND[rows], scan_W_enc_DM, out=z_nM).relu_()
        torch.mm(scan_g_ND[rows], scan_W_dec_DM, out=out_nM).abs_()
        torch.addcmul(z_nM, z_nM, out_nM, out=out_nM)
        indices_NK[rows] = torch.topk(out_nM, k, dim=1, sorted=False).indices
        torch.gather(z_nM, 1, indices_NK[rows], out=values_NK[rows])
    if scan_dtype != torch.float32:
        starts_N = torch.arange(n_rows, device=x_ND.device) * k
        dots_S = gathered_dots(indices_NK.view(-1), starts_N, x_ND, W_enc_MD)
        values_NK = (dots_S.view(n_rows, k) + b_enc_M[indices_NK]).relu_()
    return values_NK, indices_NK
