"""Gradients of matching pursuit's coefficients, the picks held fixed.

Shapes: N rows (n of them at once), S = N K entries, D = d_in, M atoms, K picks per row.

For one row, with its picked atoms as the rows of P [K, D], the recursion c_t = r_t . d_t,
r_{t+1} = r_t - c_t d_t is the triangular system

    (I + L) c = P x,    L = strictly lower part of P P^T,

because r_t = x - sum_{s<t} c_s d_s. With g = dloss/dc and gamma = (I + L)^-T g this gives

    dloss/dx = P^T gamma,    dloss/dP = gamma x^T - (B + B^T) P,    B = strictly lower part of gamma c^T.

So only the picks and the coefficients of the forward pass have to be kept, and the residuals are never
rebuilt one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saebench_kernels.entries import Entries
from saebench_kernels.latent_sums import group_by_latent, latent_sums
from saebench_kernels.row_chunks import map_chunks

_CHUNK_ELEMENTS = 1 << 22
"""Elements of [n, K, D] made at once: 16 MiB, sixteen times that on a GPU, or as many as the atoms have."""


def matching_pursuit_coefficients(
    values_S: Tensor, entries: Entries, x_ND: Tensor, atoms_MD: Tensor, b_dec_D: Tensor
) -> Tensor:
    """``values_S`` with the gradients of the coefficients of a pursuit of ``x - b_dec``.

    ``entries`` has ``k`` set and is in the order of the picks. Differentiable in ``atoms`` and ``b_dec``;
    ``x`` is data, and the picks have no gradient.
    """
    if not torch.is_grad_enabled():
        return values_S
    out_S: Tensor = _Coefficients.apply(  # type: ignore[no-untyped-call]
        values_S, entries, x_ND, atoms_MD, b_dec_D
    )
    return out_S


class _Coefficients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values_S: Tensor, entries: Entries, x_ND: Tensor, atoms_MD: Tensor, b_dec_D: Tensor
    ) -> Tensor:
        ctx.entries = entries
        ctx.save_for_backward(values_S, x_ND, atoms_MD, b_dec_D)
        return values_S.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values_S, x_ND, atoms_MD, b_dec_D = ctx.saved_tensors
        indices_NK, values_NK, d_values_NK = (
            tensor_S.view(-1, ctx.entries.k) for tensor_S in (ctx.entries.indices, values_S, grads[0])
        )
        d_x_ND, d_atoms_MD = matching_pursuit_gradients(
            x_ND - b_dec_D, atoms_MD, indices_NK, values_NK, d_values_NK
        )
        return None, None, None, d_atoms_MD, -d_x_ND.sum(0)


def matching_pursuit_gradients(
    x_ND: Tensor, atoms_MD: Tensor, indices_NK: Tensor, values_NK: Tensor, d_values_NK: Tensor
) -> tuple[Tensor, Tensor]:
    """``d_x_ND`` and ``d_atoms_MD`` from the gradient of the values of ``matching_pursuit_encode``.

    A value of 0 passes no gradient: its row had ended. Sums over rows are taken in a fixed order, without
    atomics.
    """
    (n_rows, k), d_in, device = indices_NK.shape, x_ND.shape[1], x_ND.device
    d_x_ND, d_atoms_MD = torch.zeros_like(x_ND), torch.zeros_like(atoms_MD)

    def gradients(rows: slice) -> Tensor:
        indices_S, values_nK = indices_NK[rows].reshape(-1), values_NK[rows]
        picked_nKD = atoms_MD.index_select(0, indices_S).view(-1, k, d_in)
        overlaps_nKK = torch.bmm(picked_nKD, picked_nKD.mT)
        d_values_nK1 = (d_values_NK[rows] * (values_nK != 0))[:, :, None]
        gamma_nK1 = torch.linalg.solve_triangular(overlaps_nKK, d_values_nK1, upper=True, unitriangular=True)
        lower_nKK = (gamma_nK1 * values_nK[:, None, :]).tril_(-1)
        d_picked_nKD = gamma_nK1 * x_ND[rows, None, :]
        d_picked_nKD.baddbmm_(lower_nKK + lower_nKK.mT, picked_nKD, alpha=-1)
        d_x_ND[rows] = torch.bmm(gamma_nK1.mT, picked_nKD)[:, 0]
        entries_S = torch.arange(len(indices_S), device=device)
        groups = group_by_latent(indices_S, entries_S, len(atoms_MD))
        return latent_sums(groups, torch.ones(len(indices_S), device=device), d_picked_nKD.view(-1, d_in))

    elements = max(_CHUNK_ELEMENTS << (0 if device.type == "cpu" else 4), atoms_MD.numel())
    for d_some_MD in map_chunks(gradients, n_rows, max(1, elements // (k * d_in)), device):
        d_atoms_MD += d_some_MD
    return d_x_ND, d_atoms_MD
