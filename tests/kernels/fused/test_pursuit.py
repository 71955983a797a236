"""Matching pursuit by the Gram matrix: picks and coefficients replayed in float64, and its gradients."""

import pytest
import torch
import torch.nn.functional as F

from saebench_kernels.fused.pursuit import energy_gradients, pursue
from tests.kernels.fused.problems import DEVICE, ON_GPU, SLOW_INTERPRETED

ROUNDING = 8 * torch.finfo(torch.float32).eps
SHAPES = [
    (1, 1, 1, 1),
    (7, 24, 130, 5),
    (5, 7, 33, 9),
    (3, 16, 300, 2),
    *([(8192, 768, 24576, 32), (1021, 2304, 16_381, 64), (509, 63, 4099, 20)] * ON_GPU),
]
"""N, D, M, k; k well below D, since proposals get worse once a residual is small (see NOTES.md)."""


def _problem(n, d, m):
    generator = torch.Generator().manual_seed(0)
    x_ND, atoms_MD = (torch.randn(rows, d, generator=generator) for rows in (n, m))
    return x_ND.to(DEVICE), F.normalize(atoms_MD, dim=1).to(DEVICE)


def _pursue(x_ND, atoms_MD, k, **settings):
    settings = {"tolerance": 0.0, "absolute": False, "rounding": ROUNDING, **settings}
    return pursue(x_ND, atoms_MD, k, **settings)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_picks_are_the_best_up_to_rounding_and_coefficients_exact(shape, absolute):
    n, d, m, k = shape
    x_ND, atoms_MD = _problem(n, d, m)
    found = _pursue(x_ND, atoms_MD, k, absolute=absolute)
    rows = slice(0, 256)
    residual_nD, size_n = x_ND[rows].double(), x_ND[rows].double().norm(dim=1)
    n_picks = n_best = 0
    ended_n = torch.zeros(len(size_n), dtype=torch.bool, device=DEVICE)
    for t in range(k):
        scores_nM = residual_nD @ atoms_MD.double().T
        by_nM = scores_nM.abs() if absolute else scores_nM
        value_n, pick_n = found.values_NK[rows, t].double(), found.indices_NK[rows, t].long()
        ended_n |= value_n == 0
        assert (value_n[ended_n] == 0).all() and (pick_n[ended_n] == 0).all()
        picked_n = scores_nM.gather(1, pick_n[:, None])[:, 0]
        assert ((picked_n - value_n).abs() <= 4e-6 * size_n)[~ended_n].all()
        best_n = by_nM.max(1).values
        reached_n = picked_n.abs() if absolute else picked_n
        assert (reached_n >= best_n - 2e-3 * size_n)[~ended_n].all()
        assert (best_n <= 4e-6 * size_n)[ended_n].all()
        n_picks += int((~ended_n).sum())
        n_best += int((reached_n >= best_n - 1e-6 * size_n)[~ended_n].sum())
        residual_nD = residual_nD - value_n[:, None] * atoms_MD[pick_n].double()
    assert n_best >= 0.995 * n_picks
    left_n = found.residual_ND[rows].double()
    torch.testing.assert_close(left_n, residual_nD, rtol=0, atol=float(1e-5 * size_n.max()))
    energy_n = left_n.square().sum(1) + found.values_NK[rows].double().square().sum(1)
    torch.testing.assert_close(energy_n, size_n.square(), rtol=1e-5, atol=0)


def test_rows_end_where_nothing_is_left():
    atoms_MD = torch.eye(20, device=DEVICE)[:8]
    x_ND = torch.zeros(5, 20, device=DEVICE)
    x_ND[1, 3] = 2.0
    x_ND[2, 3] = -2.0
    x_ND[3, :2] = torch.tensor([1e30, 1e29])
    x_ND[4, 0] = torch.nan
    found = _pursue(x_ND, atoms_MD, 4)
    assert (found.values_NK[0] == 0).all() and (found.values_NK[2] == 0).all()
    assert found.values_NK[1].tolist() == [2, 0, 0, 0] and found.indices_NK[1].tolist() == [3, 0, 0, 0]
    assert found.indices_NK[3].tolist() == [0, 1, 0, 0] and (found.values_NK[3, 2:] == 0).all()
    assert found.values_NK[4].isnan().all() and found.residual_ND[4].isnan().any()
    both = _pursue(x_ND[2:3], atoms_MD, 4, absolute=True)
    assert both.values_NK.tolist() == [[-2, 0, 0, 0]] and (both.residual_ND == 0).all()


def test_a_row_ends_below_the_tolerance_given_either_way():
    x_ND, atoms_MD = _problem(16, 12, 40)
    full = _pursue(x_ND, atoms_MD, 6)
    left_NK = x_ND.square().sum(1, keepdim=True) - full.values_NK.square().cumsum(1)
    tolerance = float(left_NK[:, 2].mean().sqrt())
    some = _pursue(x_ND, atoms_MD, 6, tolerance=tolerance)
    same = _pursue(x_ND, atoms_MD, 6, tolerance=torch.tensor(tolerance, device=DEVICE))
    before_NK = torch.cat([x_ND.square().sum(1, keepdim=True), left_NK[:, :-1]], dim=1)
    kept_NK = before_NK.sqrt() >= tolerance
    assert 0 < kept_NK.float().mean() < 1
    assert torch.equal(some.values_NK, full.values_NK * kept_NK)
    assert torch.equal(some.values_NK, same.values_NK) and torch.equal(some.indices_NK, same.indices_NK)


def test_with_more_picks_the_first_stay_the_same_and_all_repeats():
    x_ND, atoms_MD = _problem(33, 24, 200)
    few, many, again = (_pursue(x_ND, atoms_MD, k) for k in (4, 7, 7))
    assert torch.equal(many.values_NK[:, :4], few.values_NK)
    assert torch.equal(many.indices_NK[:, :4], few.indices_NK)
    assert all(torch.equal(a, b) for a, b in zip(many, again, strict=True))


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (50, 24, 40, 6), pytest.param((300, 9, 5, 3), marks=SLOW_INTERPRETED)]
)
def test_gradients_are_those_of_the_recursion(shape, absolute):
    n, d, m, k = shape
    x_ND, atoms_MD = _problem(n, d, m)
    found = _pursue(x_ND, atoms_MD, k, absolute=absolute)
    free_MD = atoms_MD.double().requires_grad_()
    b_D = torch.zeros(d, dtype=torch.float64, device=DEVICE, requires_grad=True)
    residual_ND = x_ND.double() - b_D
    for t in range(k):
        there_N = found.values_NK[:, t, None] != 0
        atom_ND = free_MD[found.indices_NK[:, t].long()]
        residual_ND = residual_ND - there_N * (residual_ND * atom_ND).sum(1, keepdim=True) * atom_ND
    (residual_ND.square().sum() * 0.35).backward()
    d_atoms_MD, d_b_D = energy_gradients(found, atoms_MD, torch.tensor(0.7, device=DEVICE))
    size = float(free_MD.grad.abs().max())
    torch.testing.assert_close(d_atoms_MD.double(), free_MD.grad, rtol=2e-2, atol=1e-2 * size + 1e-5)
    torch.testing.assert_close(d_b_D.double(), b_D.grad, rtol=1e-3, atol=1e-4 * float(x_ND.norm()))
