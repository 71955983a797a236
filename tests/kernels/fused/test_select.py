"""The k best latents of each row: exactly those of a stable sort, for any values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench_kernels.fused.scan import scan
from saebench_kernels.fused.select import keep_topk, select_topk
from tests.kernels.fused.problems import (
    DEVICE,
    HALVES,
    ON_GPU,
    SHAPES,
    TILES,
    in_total_order,
    problem,
    scanned,
    score_of,
)


def _check(found, k, m):
    values_NK, indices_NK = select_topk(found, k, m)
    rows = slice(0, 512)
    expected_NK = in_total_order(score_of(found)[rows, :m], k).to(DEVICE)
    assert torch.equal(indices_NK[rows].long(), expected_NK)
    assert torch.equal(values_NK[rows], found.pre_NP[rows].float().gather(1, expected_NK))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_select_topk_gives_the_k_best_of_a_scan(shape, dtype):
    n, d, m, k = shape
    x_ND, W_MD, b_M = problem(n, d, m, dtype)
    _check(scan(x_ND, W_MD, b_M, tiles=TILES), k, m)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_k_best_scores_and_their_values(shape):
    n, d, m, k = shape
    x_ND, W_MD, b_M = problem(n, d, m, torch.bfloat16)
    g_ND, D_MD, _ = problem(n, d, m, torch.bfloat16, seed=7)
    _check(scan(x_ND, W_MD, b_M, g_ND=g_ND, W_dec_MD=D_MD, tiles=TILES), k, m)


@settings(max_examples=100 if ON_GPU else 12, deadline=None)
@given(st.data())
def test_ties_rows_of_zeros_and_few_values(data):
    m = data.draw(st.sampled_from([1, 15, 16, 17, 128, 129, 200]))
    k = data.draw(st.integers(1, m))
    levels = data.draw(st.integers(1, 4))
    seed = data.draw(st.integers(0, 999))
    pre_NM = torch.randint(0, levels, (7, m), generator=torch.Generator().manual_seed(seed)).bfloat16()
    pre_NM[0] = 0
    _check(scanned(pre_NM), k, m)


def test_nan_is_selected_first():
    pre_NM = torch.rand(4, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = scanned(pre_NM)
    for tensor in (found.pre_NP, found.maxima_NG, found.large_NG):
        tensor[1, 0] = torch.nan
        tensor[2, 0] = -torch.tensor(torch.nan)
    values_NK, indices_NK = select_topk(found, 3, 200)
    assert values_NK[1:3, 0].isnan().all() and (indices_NK[1:3, 0] == 0).all()
    assert values_NK[:, 1:].isfinite().all()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize(("columns", "k"), [(1, 1), (7, 3), (256, 256), (300, 17), (1229, 384)])
def test_keep_topk_sets_the_others_to_zero(dtype, columns, k):
    pre_NA = torch.randint(0, 9, (5, columns), generator=torch.Generator().manual_seed(k)).to(DEVICE, dtype)
    expected_NA = torch.zeros_like(pre_NA)
    kept_NK = in_total_order(pre_NA, k).to(DEVICE)
    expected_NA.scatter_(1, kept_NK, pre_NA.gather(1, kept_NK))
    keep_topk(pre_NA, k)
    assert torch.equal(pre_NA, expected_NA)
