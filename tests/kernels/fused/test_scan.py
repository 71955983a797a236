"""The scan of all latents: the product against float64, and its maxima against itself."""

import pytest
import torch

from saebench_kernels.fused.scan import GROUP, LARGE_GROUP, scan
from tests.kernels.fused.problems import DEVICE, HALVES, SHAPES, TILES, problem, score_of


def _exact(x_ND, W_MD, b_M=None):
    rows = slice(0, 256)
    pre_NM = x_ND[rows].double() @ W_MD.double().T
    return pre_NM if b_M is None else pre_NM + b_M.double()


def _check_maxima(found):
    score_NP = score_of(found)
    for size, maxima_NG in ((GROUP, found.maxima_NG), (LARGE_GROUP, found.large_NG)):
        assert torch.equal(maxima_NG, score_NP.view(len(score_NP), -1, size).amax(2))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_pre_activations_are_within_two_ulp_of_float64(shape, dtype):
    n, d, m, _ = shape
    x_ND, W_MD, b_M = problem(n, d, m, dtype)
    found = scan(x_ND, W_MD, b_M, tiles=TILES)
    exact_NM = _exact(x_ND, W_MD, b_M).relu()
    # Two units of the type at the result, and the rounding of float32 sums of d terms of unit size.
    slack = 2 * torch.finfo(dtype).eps * exact_NM + d * torch.finfo(torch.float32).eps * 4
    assert ((found.pre_NP[:256, :m].double() - exact_NM).abs() <= slack).all()
    assert (found.pre_NP[:, m:] == 0).all()
    _check_maxima(found)


@pytest.mark.parametrize("shape", SHAPES)
def test_pre_activations_below_the_floor_become_zero(shape):
    n, d, m, _ = shape
    x_ND, W_MD, b_M = problem(n, d, m, torch.bfloat16)
    floor_M = 2 * torch.rand(m, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = scan(x_ND, W_MD, b_M, floor_M=floor_M, tiles=TILES)
    plain = scan(x_ND, W_MD, b_M, tiles=TILES)
    clear_NM = (_exact(x_ND, W_MD, b_M) - floor_M.double()).abs() > 1e-3
    above_NM = _exact(x_ND, W_MD, b_M) > floor_M.double()
    expected_NM = torch.where(above_NM, plain.pre_NP[:256, :m], 0)
    assert torch.equal(found.pre_NP[:256, :m][clear_NM], expected_NM[clear_NM])
    _check_maxima(found)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_score_is_z_times_one_plus_the_effect(shape, dtype):
    n, d, m, _ = shape
    x_ND, W_MD, b_M = problem(n, d, m, dtype)
    g_ND, D_MD, _ = problem(n, d, m, dtype, seed=7)
    found = scan(x_ND, W_MD, b_M, g_ND=g_ND, W_dec_MD=D_MD, tiles=TILES)
    effect_NM = _exact(g_ND, D_MD).abs()
    z_NM = _exact(x_ND, W_MD, b_M).relu()
    exact_NM = z_NM * (1 + effect_NM)
    slack = 4 * torch.finfo(dtype).eps * exact_NM + d * 4e-7 * (2 + effect_NM + z_NM) * 4
    assert ((score_of(found)[:256, :m].double() - exact_NM).abs() <= slack).all()
    assert (
        (found.pre_NP[:256, :m].double() - z_NM).abs() <= 2 * torch.finfo(dtype).eps * z_NM + d * 1e-6
    ).all()
    _check_maxima(found)


def test_nan_is_the_maximum_of_its_groups():
    x_ND, W_MD, b_M = problem(20, 24, 300, torch.bfloat16)
    x_ND[3, 5] = torch.nan
    W_MD[200, 0] = torch.nan
    found = scan(x_ND, W_MD, b_M, tiles=TILES)
    assert found.pre_NP[3, :300].isnan().all() and found.pre_NP[:, 200].isnan().all()
    assert (
        found.maxima_NG[:, 200 // GROUP].isnan().all() and found.large_NG[:, 200 // LARGE_GROUP].isnan().all()
    )
    assert found.maxima_NG[[0, 1, 2, 4], 0].isfinite().all()


def test_results_repeat_bit_for_bit():
    x_ND, W_MD, b_M = problem(40, 24, 300, torch.bfloat16)
    first, second = (scan(x_ND, W_MD, b_M, tiles=TILES) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a is b is None or torch.equal(a, b)
