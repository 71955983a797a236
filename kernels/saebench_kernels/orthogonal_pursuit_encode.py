"""Orthogonal matching pursuit (Pati, Rezaiifar and Krishnaprasad 1993), without fused kernels.

Shapes: N rows (n of them at once), D = d_in, M atoms (the rows of the dictionary), K picks per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saebench_kernels.matching_pursuit_encode import accept, best_atoms, pad_atoms, rounding_of
from saebench_kernels.row_chunks import map_chunks

_CHUNK_ELEMENTS = 1 << 22
"""Correlations computed at once, and elements of 64 basis vectors per row: 16 MiB; 16 times that on a GPU. It
does not depend on k, since the last bits of a row depend on which rows are scanned together."""
_DEPENDENT = 1e-2
"""A row ends at a best atom whose part outside the span of those picked is shorter than this: then no atom
correlates more than that with the residual. It keeps an atom from being picked twice, coefficients below a
hundred times the input, and one Gram-Schmidt pass accurate."""


def orthogonal_pursuit_encode(
    x_ND: Tensor,
    atoms_MD: Tensor,
    k: int,
    *,
    tolerance: Tensor | float = 0.0,
    absolute: bool = False,
    scan_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """At most k picks per row of x, whose coefficients are solved for again after every pick.

    As ``matching_pursuit_encode``, but the coefficients are those of least squares on the atoms picked so
    far: the residual is orthogonal to all of them, so no atom is picked twice. A coefficient may be
    negative, whatever the sign at which its atom was picked. A row also ends when the best atom lies within
    1% of the span of those it has.

    The picked atoms are orthonormalized one after the other (Gram-Schmidt), so that a pick changes the
    residual by one projection; the coefficients come from the triangular factor at the end. Every pick
    is proposed by a scan in ``scan_dtype``: the correlations change along the new basis vector, of which
    D D^T has no row.

    Returns:
        ``values_NK`` float32 and ``indices_NK`` int64, in the order of the picks.
    """
    (n_rows, d_in), device = x_ND.shape, x_ND.device
    atoms_MD = pad_atoms(atoms_MD)
    scan_atoms_DM = atoms_MD.to(scan_dtype).T
    values_NK = torch.zeros(n_rows, k, device=device)
    indices_NK = torch.zeros(n_rows, k, dtype=torch.int64, device=device)

    def pursue(rows: slice) -> None:
        residual_nD = x_ND[rows].clone()
        floor_n1 = rounding_of(residual_nD)
        going_n1 = torch.ones_like(residual_nD[:, :1], dtype=torch.bool)
        basis_nKD = residual_nD.new_zeros(len(residual_nD), k, d_in)
        factor_nKK = torch.eye(k, device=device).repeat(len(residual_nD), 1, 1)
        along_nK1 = residual_nD.new_zeros(len(residual_nD), k, 1)
        for t in range(k):
            scores = residual_nD.to(scan_dtype) @ scan_atoms_DM
            picks_n = best_atoms(scores.abs_() if absolute else scores)
            picked_nD = atoms_MD.index_select(0, picks_n)
            gain_n1 = accept(
                residual_nD, picked_nD, floor_n1=floor_n1, tolerance=tolerance, absolute=absolute
            )
            before_nTD = basis_nKD[:, :t]
            shares_nT1 = torch.bmm(before_nTD, picked_nD[:, :, None])
            new_nD = picked_nD - torch.bmm(shares_nT1.mT, before_nTD)[:, 0]
            factor_nKK[:, :t, t] = shares_nT1[:, :, 0]
            length_n1 = new_nD.norm(dim=1, keepdim=True)
            going_n1 &= (gain_n1 != 0) & (length_n1 > _DEPENDENT)
            new_nD = torch.where(going_n1, new_nD / length_n1, 0.0)
            factor_nKK[:, t, t] = torch.where(going_n1, length_n1, 1.0)[:, 0]
            along_nK1[:, t] = (residual_nD * new_nD).sum(1, keepdim=True)
            residual_nD.addcmul_(new_nD, along_nK1[:, t], value=-1)
            basis_nKD[:, t] = new_nD
            indices_NK[rows, t] = picks_n
            if device.type == "cpu" and not going_n1.any():
                break
        values_nK1 = torch.linalg.solve_triangular(factor_nKK, along_nK1, upper=True)
        values_NK[rows] = values_nK1[:, :, 0]

    elements = _CHUNK_ELEMENTS << (0 if device.type == "cpu" else 4)
    chunk = elements // max(len(atoms_MD), 64 * d_in)
    list(map_chunks(pursue, n_rows, max(1, chunk), device))
    return values_NK, indices_NK.masked_fill_(values_NK == 0, 0)
