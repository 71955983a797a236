"""Matching pursuit (Mallat and Zhang 1993; as an SAE's encoder: Costa et al. 2025).

Shapes: N rows (n of them at once), D = d_in, M atoms (the rows of the dictionary), K picks per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saebench_kernels.dispatch import is_fused
from saebench_kernels.entries import Pursuit
from saebench_kernels.row_chunks import map_chunks

_CPU_CHUNK_ELEMENTS = 1 << 20
"""Correlations kept at once on a CPU: few enough to stay in its cache during k picks. Sixteen times as many
where each pick scans all atoms again: that product is faster with many rows."""
_GRAM_LARGEST = 16_384
"""Largest number of atoms for which the Gram matrix is computed: beyond, it would take more than 1 GiB."""
_FUSED_LARGEST = 65_536
_FUSED_ATOMS_A_ROW = 8
_ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Times |x|: a correlation up to this may be rounding alone. r <- r - c d and r . d each round by eps / 2 of
what is summed, at first |x| and then ever less, and an atom whose squared norm is off by a few eps leaves as
much of c. Rows that are sums of up to 30 of 8 to 768 orthonormal atoms were left with up to 1.9 eps |x| where
no correlation is positive, and with 3.8 where the atoms were as float32's QR leaves them."""
_GROUP = 64
"""Adjacent correlations in the vectorized half of the search for the largest."""


def matching_pursuit_encode(
    x_ND: Tensor,
    atoms_MD: Tensor,
    k: int,
    *,
    tolerance: Tensor | float = 0.0,
    absolute: bool = False,
    scan_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """At most k picks per row of x; x and the atoms are float32, the atoms of unit norm.

    Starting from r = x, each pick is i = argmax_i r . d_i, c = max(0, r . d_i), r <- r - c d_i. With
    ``absolute`` it is the argmax of |r . d_i| and c = r . d_i.
    A row ends after k picks, when |r| < ``tolerance``, or
    when |c| is at most 8 eps |x|, which is what rounding to float32 can leave of a correlation that is 0. The
    remaining slots of the row are zeros at index 0. An atom may be picked several times.

    Every c is computed in float32 from the float32 residual, so |x|^2 = sum c^2 + |r|^2 whatever proposed
    the pick. Fused (see `is_pursuit_fused`), the two largest of correlations that are kept up to date in
    float16 propose, and their float32 products decide. Eager, see ``matching_pursuit_encode_eager``.

    Returns:
        ``values_NK`` float32 and ``indices_NK``, int32 or int64, in the order of the picks.
    """
    if is_pursuit_fused(x_ND.device, scan_dtype, n_rows=len(x_ND), d_sae=len(atoms_MD)):
        found = pursue_fused(x_ND, atoms_MD, k, tolerance=tolerance, absolute=absolute)
        return found.values_NK, found.indices_NK
    return matching_pursuit_encode_eager(
        x_ND, atoms_MD, k, tolerance=tolerance, absolute=absolute, scan_dtype=scan_dtype
    )


def is_pursuit_fused(device: torch.device, scan_dtype: torch.dtype, *, n_rows: int, d_sae: int) -> bool:
    """Whether a pursuit is fused: where dispatch.py says so, for up to 65,536 atoms (their Gram matrix then
    has 8 GiB) and at most 8 atoms per row (beyond, the Gram matrix costs more than it saves)."""
    if not 0 < d_sae <= min(_FUSED_LARGEST, _FUSED_ATOMS_A_ROW * n_rows):
        return False
    return is_fused("matching_pursuit_encode", device, scan_dtype, d_sae=d_sae)


def pursue_fused(
    x_ND: Tensor, atoms_MD: Tensor, k: int, *, tolerance: Tensor | float = 0.0, absolute: bool = False
) -> Pursuit:
    """``matching_pursuit_encode`` by fused kernels, with the residuals."""
    from saebench_kernels.fused.pursuit import pursue

    return pursue(x_ND, atoms_MD.detach(), k, tolerance=tolerance, absolute=absolute, rounding=_ROUNDING)


def matching_pursuit_encode_eager(
    x_ND: Tensor,
    atoms_MD: Tensor,
    k: int,
    *,
    tolerance: Tensor | float = 0.0,
    absolute: bool = False,
    scan_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """``matching_pursuit_encode`` in plain torch.

    There are two ways to propose the picks, and ``uses_gram`` selects one by the shapes alone. Either, after
    one scan a = x D^T, the correlations are kept up to date by a <- a - c (D D^T)[i] in float32, or a = r D^T
    is computed again for every pick, in ``scan_dtype``. In float32 both make the same picks except for near
    ties.
    """
    n_rows, device, use_gram = len(x_ND), x_ND.device, uses_gram(len(x_ND), len(atoms_MD))
    atoms_MD = pad_atoms(atoms_MD)
    gram_MM = atoms_MD @ atoms_MD.T if use_gram else None
    scan_dtype = torch.float32 if use_gram else scan_dtype
    scan_atoms_DM = atoms_MD.to(scan_dtype).T
    values_NK = torch.zeros(n_rows, k, device=device)
    indices_NK = torch.zeros(n_rows, k, dtype=torch.int64, device=device)

    def pursue(rows: slice) -> None:
        residual_nD = x_ND[rows].clone()
        floor_n1 = rounding_of(residual_nD)
        scores_nM = torch.mm(residual_nD.to(scan_dtype), scan_atoms_DM)
        gathered_nM = torch.empty_like(scores_nM) if use_gram else None
        for t in range(k):
            picks_n = best_atoms(scores_nM.abs() if absolute else scores_nM)
            picked_nD = atoms_MD.index_select(0, picks_n)
            values_n1 = accept(
                residual_nD, picked_nD, floor_n1=floor_n1, tolerance=tolerance, absolute=absolute
            )
            residual_nD.addcmul_(picked_nD, values_n1, value=-1)
            values_NK[rows, t] = values_n1[:, 0]
            indices_NK[rows, t] = picks_n
            if t + 1 == k or (device.type == "cpu" and not values_n1.any()):
                break
            if gram_MM is None or gathered_nM is None:
                torch.mm(residual_nD.to(scan_dtype), scan_atoms_DM, out=scores_nM)
            else:
                torch.index_select(gram_MM, 0, picks_n, out=gathered_nM)
                scores_nM.addcmul_(gathered_nM, values_n1, value=-1)

    elements = _CPU_CHUNK_ELEMENTS << (0 if use_gram else 4)
    chunk = n_rows if device.type != "cpu" else elements // len(atoms_MD)
    list(map_chunks(pursue, n_rows, max(1, chunk), device))
    return values_NK, indices_NK.masked_fill_(values_NK == 0, 0)


def uses_gram(n_rows: int, n_atoms: int) -> bool:
    """Whether correlations are updated by D D^T rather than computed again for every pick.

    D D^T costs as much as M / N scans and must fit into 1 GiB; an update costs a small part of a scan.
    Measured on a CPU for d_in 64 to 768, the updates win at M = 4 N from about 8 picks on, with 32 picks by
    2 to 5 times, and at M = N by 2 to 8. The number of picks has no influence, so that the codes with k are
    always exactly the beginning of those with k + 1.
    """
    return n_atoms <= min(_GRAM_LARGEST, 4 * n_rows)


def pad_atoms(atoms_MD: Tensor) -> Tensor:
    """The atoms, padded with zeros (which are never picked) to whole groups of ``best_atoms``."""
    missing = -len(atoms_MD) % _GROUP
    return torch.nn.functional.pad(atoms_MD.detach(), (0, 0, 0, missing))


def best_atoms(scores_nM: Tensor) -> Tensor:
    """[n] int64: the index of the largest score of each row; M is a multiple of 64.

    On a CPU torch's argmax goes element by element, ten times slower than its maximum over a middle axis.
    So the largest of each of 64 interleaved groups is found first, then the best group, then its member.
    """
    if scores_nM.is_cuda:
        return scores_nM.argmax(1)
    scores_nGg = scores_nM.view(len(scores_nM), -1, _GROUP)
    best_n11 = scores_nGg.amax(1).argmax(1)[:, None, None]
    members_nG = scores_nGg.gather(2, best_n11.expand(-1, scores_nGg.shape[1], 1))[:, :, 0]
    return members_nG.argmax(1) * _GROUP + best_n11[:, 0, 0]


def rounding_of(x_nD: Tensor) -> Tensor:
    """[n, 1]: the largest correlation with what a pursuit leaves of these rows that may be rounding alone."""
    norm_n1: Tensor = torch.linalg.vector_norm(x_nD, dim=1, keepdim=True, dtype=torch.float64)
    return (_ROUNDING * norm_n1).to(x_nD.dtype)


def accept(
    residual_nD: Tensor,
    picked_nD: Tensor,
    *,
    floor_n1: Tensor,
    tolerance: Tensor | float,
    absolute: bool,
) -> Tensor:
    """[n, 1]: the coefficient of the atom picked for each row, 0 where the row has ended."""
    values_n1 = (residual_nD * picked_nD).sum(1, keepdim=True)
    ended_n1 = (values_n1.abs() if absolute else values_n1) <= floor_n1
    if isinstance(tolerance, Tensor) or tolerance > 0:
        ended_n1 |= residual_nD.norm(dim=1, keepdim=True) < tolerance
    return values_n1.masked_fill_(ended_n1, 0.0)
