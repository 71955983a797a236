"""Encode rows and keep, for each latent, its largest pre-activations.

Shapes: N rows, D = d_in, M = d_sae latents, c latents at once, S entries kept, row by row.
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
_FUSED_MOST_ROWS = 1 << 15


def feature_choice_encode(
    x_ND: Tensor,
    W_enc_MD: Tensor,
    b_enc_M: Tensor,
    budgets_M: Tensor,
    *,
    scan_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``budgets[m]`` largest positive entries of each column m of ``relu(x W_enc^T + b_enc)``.

    x is of any float type, the weights are float32; budgets int64, each between 0 and N. A column with fewer
    positive entries keeps those. Waits for the GPU once, to read the number of entries.

    Fused (see dispatch.py; up to 32,768 rows), the selection is exact on the pre-activations of the scan,
    rounded to its type: the largest are kept, of equal ones those of the first rows. The values are rounded,
    and NaN counts as the largest. Eager, see ``feature_choice_encode_eager``.

    Returns:
        ``values_S`` float32, ``indices_S`` int32 or int64, ascending within a row, and ``offsets`` [N + 1]
        int64: where each row begins.
    """
    n_rows, d_sae = len(x_ND), len(W_enc_MD)
    if 0 < n_rows <= _FUSED_MOST_ROWS and is_fused(
        "feature_choice_encode", x_ND.device, scan_dtype, d_sae=d_sae
    ):
        from saebench_kernels.fused.by_latent import select_by_latent

        scan_W_MD = rounded(W_enc_MD, scan_dtype)
        return select_by_latent(rounded(x_ND, scan_dtype), scan_W_MD, b_enc_M, budgets_M)
    return feature_choice_encode_eager(x_ND.float(), W_enc_MD, b_enc_M, budgets_M, scan_dtype=scan_dtype)


def feature_choice_encode_eager(
    x_ND: Tensor,
    W_enc_MD: Tensor,
    b_enc_M: Tensor,
    budgets_M: Tensor,
    *,
    scan_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """``feature_choice_encode`` in plain torch; which of equal values at the border are kept is unspecified.

    Latents are processed in the order of their budgets, those with similar budgets together, so that no
    latent is sorted much deeper than it needs. When ``scan_dtype`` is not float32, the scan only proposes,
    and the values of the entries picked are computed again in float32.
    """
    n_rows, d_sae = x_ND.shape[0], W_enc_MD.shape[0]
    scan_x_DN, scan_W_MD, scan_b_M = x_ND.to(scan_dtype).T, W_enc_MD.to(scan_dtype), b_enc_M.to(scan_dtype)
    limit = _CUDA_CHUNK_ELEMENTS if x_ND.is_cuda else _CPU_CHUNK_ELEMENTS
    ordered = torch.sort(budgets_M, descending=True, stable=True)
    values, flats = [x_ND.new_empty(0)], [budgets_M.new_empty(0)]
    for start, stop, budget in _chunks(ordered.values.tolist(), max(1, limit // max(1, n_rows))):
        latents_c = ordered.indices[start:stop]
        pre_cN = torch.addmm(scan_b_M[latents_c, None], scan_W_MD[latents_c], scan_x_DN)
        top = pre_cN.topk(budget, dim=1)
        slots = torch.arange(budget, device=x_ND.device)
        kept_ck = (slots < ordered.values[start:stop, None]) & (top.values > 0)
        values.append(top.values[kept_ck].float())
        flats.append((top.indices * d_sae + latents_c[:, None])[kept_ck])
    flat_S, order_S = torch.cat(flats).sort()
    indices_S = flat_S % d_sae
    offsets = torch.searchsorted(flat_S, torch.arange(n_rows + 1, device=x_ND.device) * d_sae)
    if scan_dtype == torch.float32:
        return torch.cat(values)[order_S], indices_S, offsets
    dots_S = gathered_dots(indices_S, offsets[:-1], x_ND, W_enc_MD)
    return (dots_S + b_enc_M[indices_S]).relu_(), indices_S, offsets


def _chunks(budgets: list[int], most: int) -> list[tuple[int, int, int]]:
    """(start, stop, largest budget) of runs of at most ``most`` descending budgets within a factor of two.

    Latents without a budget are left out.
    """
    chunks: list[tuple[int, int, int]] = []
    start = 0
    for at, budget in enumerate([*budgets, 0]):
        if at > start and (2 * budget <= budgets[start] or at - start == most):
            chunks.append((start, at, budgets[start]))
            start = at
        if budget == 0:
            break
    return chunks
