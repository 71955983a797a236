"""mutual_choice_encode against sorting the dense matrix: exact budget, ties by index, hints of any kind."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench_kernels.mutual_choice_encode import mutual_choice_encode_eager as mutual_choice_encode

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
on_every_device = pytest.mark.parametrize("device", DEVICES)
hints = st.one_of(st.floats(width=32), st.sampled_from([float("nan"), float("inf"), -1.0, 0.0]))


def whole_numbers(n, d, m, seed, device="cpu"):
    """A problem of small whole numbers: float32 products are exact and ties are many."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (n, d), (m, d), (m,)
    x_ND, W_MD, b_M = (torch.randint(-2, 3, shape, generator=generator).float() for shape in shapes)
    return x_ND.to(device), W_MD.to(device), b_M.to(device)


def gaussian(n, d, m, seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(n, d, generator=generator) * torch.rand(n, 1, generator=generator)
    return x_ND.to(device), torch.randn(m, d, generator=generator).to(device), torch.zeros(m, device=device)


def choose_by_sorting(pre_NM, budget):
    """Mask [N, M] of the entries that should be kept."""
    order = torch.sort(pre_NM.flatten(), descending=True, stable=True).indices[:budget]
    kept = torch.zeros(pre_NM.numel(), dtype=torch.bool, device=pre_NM.device)
    kept[order] = True
    return kept.view_as(pre_NM) & (pre_NM > 0)


def dense(values_S, indices_S, offsets, d_sae):
    out = values_S.new_zeros(offsets.numel() - 1, d_sae)
    rows_S = torch.repeat_interleave(offsets.diff())
    out[rows_S, indices_S] = values_S
    return out


@on_every_device
@pytest.mark.parametrize("rows_at_once", [None, 1, 3])
@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 23), st.integers(1, 7), st.integers(1, 31), st.integers(0, 999)),
    budget=st.integers(1, 800),
    hint=hints,
)
def test_it_is_the_sorted_choice_whatever_the_hint(device, rows_at_once, size, budget, hint):
    x_ND, W_MD, b_M = whole_numbers(*size, device)
    n_rows, d_sae = len(x_ND), len(W_MD)
    budget = min(budget, n_rows * d_sae)
    module, hint = sys.modules[mutual_choice_encode.__module__], torch.tensor(hint, device=device)
    with pytest.MonkeyPatch.context() as patch:
        if rows_at_once:
            patch.setattr(module, "_CPU_CHUNK_ELEMENTS", rows_at_once * d_sae)
            patch.setattr(module, "_CUDA_CHUNK_ELEMENTS", rows_at_once * d_sae)
        values_S, indices_S, offsets = mutual_choice_encode(x_ND, W_MD, b_M, budget, hint)
    pre_NM = x_ND @ W_MD.T + b_M
    kept_NM = choose_by_sorting(pre_NM, budget)
    assert values_S.numel() == min(budget, int((pre_NM > 0).sum()))
    assert torch.equal(dense(values_S, indices_S, offsets, d_sae), pre_NM * kept_NM)
    assert torch.equal(offsets.diff(), kept_NM.sum(1))
    assert torch.equal(indices_S, kept_NM.nonzero()[:, 1])


@on_every_device
@pytest.mark.parametrize("scan_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_hint_gives_the_same_bits(device, scan_dtype):
    problem = gaussian(600, 24, 4001, 0, device)
    first = mutual_choice_encode(*problem, 9000, torch.tensor(0.0, device=device), scan_dtype=scan_dtype)
    smallest = float(first[0].min())
    for factor in (-1, 0.2, 0.9, 0.97, 0.99, 1, 1.001, 1.02, 3, float("inf"), float("nan")):
        hint = torch.tensor(factor * smallest, device=device)
        other = mutual_choice_encode(*problem, 9000, hint, scan_dtype=scan_dtype)
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True)), factor


@on_every_device
def test_a_hint_that_hides_what_rounding_moved_below_it_does_no_harm(device):
    """Enough entries of the scan exceed it, but not all that are among the largest in float32."""
    x_ND, W_MD, b_M = gaussian(600, 24, 4001, 0, device)
    hint, nothing = torch.tensor(9.6875, device=device), torch.tensor(0.0, device=device)
    budget = int((x_ND.bfloat16() @ W_MD.bfloat16().T > hint).sum()) - 5
    expected, got = (
        mutual_choice_encode(x_ND, W_MD, b_M, budget, h, scan_dtype=torch.bfloat16) for h in (nothing, hint)
    )
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@on_every_device
@pytest.mark.parametrize("scan_dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_scan_only_proposes(device, scan_dtype):
    """The choice and the values are those of float32: the slack is wider than the scan's error."""
    x_ND, W_MD, b_M = gaussian(400, 64, 1000, 1, device)
    hint = torch.tensor(0.0, device=device)
    values_S, indices_S, offsets = mutual_choice_encode(x_ND, W_MD, b_M, 4000, hint, scan_dtype=scan_dtype)
    pre_NM = x_ND.double() @ W_MD.double().T
    expected_NM = (pre_NM * choose_by_sorting(pre_NM, 4000)).float()
    assert values_S.dtype == torch.float32
    torch.testing.assert_close(dense(values_S, indices_S, offsets, 1000), expected_NM, rtol=1e-5, atol=1e-5)


def test_nothing_positive_gives_empty_rows():
    x_ND, W_MD, b_M = torch.zeros(3, 4), torch.ones(10, 4), -torch.ones(10)
    for hint in (0.0, 1.0):
        values_S, indices_S, offsets = mutual_choice_encode(x_ND, W_MD, b_M, 6, torch.tensor(hint))
        assert values_S.numel() == indices_S.numel() == 0 and offsets.tolist() == [0, 0, 0, 0]


def test_nan_is_never_kept():
    x_ND, W_MD, b_M = gaussian(20, 8, 30, 2)
    x_ND[5] = torch.nan
    values_S, _, offsets = mutual_choice_encode(x_ND, W_MD, b_M, 100, torch.tensor(0.1))
    assert values_S.numel() == 100 and values_S.isfinite().all() and offsets.diff()[5] == 0
