"""Encode and keep, for each latent, the rows of its largest pre-activations: the eager reference.

Shapes: N rows, D = d_in, M = d_sae latents, c latents at once, S entries kept, row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saebench_kernels.gathered_dots import gathered_dots

_CPU_CHUNK_ELEMENTS = 1 << 20
"""Pre-activations made at once on a CPU: few enough to be in its cache when the largest are looked for."""
_CUDA_CHUNK_ELEMENTS = 1 << 26


def feature_choice_encode(
    x_ND: Tensor,
    W_enc_MD: Tensor,
    b_enc_M: Tensor,
    budgets_M: Tensor,
    *,
    scan_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``budgets[m]`` largest positive entries of each column m of ``relu(x W_enc^T + b_enc)``.

    x and weights are float32; budgets int64, each between 0 and N. A column with fewer positive entries
    keeps those. Which of several equal values at the border is kept is unspecified.

    Latents are taken in order of their budgets, those of similar ones together, so that no latent is sorted
    much deeper than it needs. When ``scan_dtype`` is not float32 the scan only proposes: the values of the
    entries picked are computed again in float32.

    Returns:
        ``values_S`` float32, ``indices_S`` int64, ascending within a row, and ``offsets`` [N + 1] int64:
        where each row begins.
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

    Latents without a budget are in none.
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
