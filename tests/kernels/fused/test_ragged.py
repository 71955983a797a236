"""Mutual choice and thresholds on a scan: exactly the entries of a stable sort over the whole batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench_kernels.fused.ragged import select_largest, select_positive
from saebench_kernels.fused.scan import scan
from tests.kernels.fused.problems import DEVICE, HALVES, ON_GPU, SHAPES, TILES, problem, scanned

SMALL = [shape for shape in SHAPES if shape[0] * shape[2] < 1 << 28]


def _check(found, budget, m, hint):
    values_S, indices_S, offsets = select_largest(found, budget, hint, m)
    pre = found.pre_NP[:, :m].float().flatten()
    ordered = torch.sort(pre, descending=True, stable=True)
    expected = ordered.indices[:budget][ordered.values[:budget] > 0].sort().values
    n = int(offsets[-1])
    rows_S = torch.repeat_interleave(offsets.diff())
    assert torch.equal(rows_S * m + indices_S[:n], expected)
    assert torch.equal(values_S[:n], pre[expected])
    assert len(values_S) == budget and (values_S[n:] == 0).all() and (indices_S[n:] == 0).all()
    return ordered.values[min(budget, len(pre)) - 1]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SMALL)
def test_the_largest_of_the_batch_whatever_the_hint(shape, dtype):
    n, d, m, k = shape
    x_ND, W_MD, b_M = problem(n, d, m, dtype)
    found = scan(x_ND, W_MD, b_M, tiles=TILES)
    smallest = _check(found, k * n, m, torch.zeros((), device=DEVICE))
    for factor in (0.9, 1.0, 1.1, 1e6):
        _check(found, k * n, m, smallest * factor)


@settings(max_examples=60 if ON_GPU else 8, deadline=None)
@given(
    st.sampled_from([1, 17, 130]), st.integers(1, 4), st.integers(1, 400), st.floats(0, 4), st.integers(0, 99)
)
def test_ties_go_to_the_first_of_the_batch(m, levels, budget, hint, seed):
    pre_NM = torch.randint(0, levels, (6, m), generator=torch.Generator().manual_seed(seed)).bfloat16()
    pre_NM[2] = 0
    _check(scanned(pre_NM), budget, m, torch.tensor(hint, device=DEVICE))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SMALL)
def test_select_positive_keeps_all_entries_above_their_floor(shape, dtype):
    n, d, m, _ = shape
    x_ND, W_MD, b_M = problem(n, d, m, dtype)
    floor_M = 3 * torch.rand(m, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = scan(x_ND, W_MD, b_M, floor_M=floor_M, tiles=TILES)
    values_S, indices_S, offsets = select_positive(found, m)
    row_S, latent_S = (found.pre_NP[:, :m] > 0).nonzero().unbind(1)
    assert torch.equal(torch.repeat_interleave(offsets.diff()), row_S)
    assert torch.equal(indices_S.long(), latent_S)
    assert torch.equal(values_S, found.pre_NP[row_S, latent_S].float())
