"""feature_choice_encode against sorting the columns of the dense matrix."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench_kernels import feature_choice_encode
from saebench_kernels.feature_choice_encode import feature_choice_encode_eager

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
on_every_device = pytest.mark.parametrize("device", DEVICES)


def problem(n, d, m, seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    x_ND, W_MD, b_M = (torch.randn(shape, generator=generator) for shape in ((n, d), (m, d), (m,)))
    budgets_M = torch.randint(0, n + 1, (m,), generator=generator)
    return x_ND.to(device), W_MD.to(device), b_M.to(device), budgets_M.to(device)


def choose_by_sorting(pre_NM, budgets_M):
    """Mask [N, M] of the entries that should be kept."""
    ranks_NM = pre_NM.argsort(0, descending=True).argsort(0)
    return (ranks_NM < budgets_M) & (pre_NM > 0)


def dense(values_S, indices_S, offsets, d_sae):
    out = values_S.new_zeros(offsets.numel() - 1, d_sae)
    out[torch.repeat_interleave(offsets.diff()), indices_S] = values_S
    return out


@on_every_device
@pytest.mark.parametrize("latents_at_once", [None, 1, 5])
@settings(max_examples=50, deadline=None)
@given(size=st.tuples(st.integers(1, 37), st.integers(1, 9), st.integers(1, 41), st.integers(0, 999)))
def test_every_column_keeps_its_largest_positive_entries(device, latents_at_once, size):
    x_ND, W_MD, b_M, budgets_M = problem(*size, device)
    module = sys.modules[feature_choice_encode.__module__]
    with pytest.MonkeyPatch.context() as patch:
        if latents_at_once:
            patch.setattr(module, "_CPU_CHUNK_ELEMENTS", latents_at_once * len(x_ND))
            patch.setattr(module, "_CUDA_CHUNK_ELEMENTS", latents_at_once * len(x_ND))
        values_S, indices_S, offsets = feature_choice_encode(x_ND, W_MD, b_M, budgets_M)
    pre_NM = x_ND.double() @ W_MD.double().T + b_M.double()
    kept_NM = choose_by_sorting(pre_NM, budgets_M)
    got_NM = dense(values_S, indices_S, offsets, len(W_MD))
    torch.testing.assert_close(got_NM.double(), pre_NM * kept_NM, rtol=1e-5, atol=1e-5)
    assert torch.equal((got_NM > 0).sum(0), (pre_NM > 0).sum(0).minimum(budgets_M))
    assert torch.equal(indices_S, kept_NM.nonzero()[:, 1])
    assert torch.equal(offsets.diff(), kept_NM.sum(1))


@on_every_device
def test_a_budget_of_all_rows_is_a_relu(device):
    x_ND, W_MD, b_M, _ = problem(50, 16, 70, 0, device)
    budgets_M = torch.full((70,), 50, device=device)
    got_NM = dense(*feature_choice_encode(x_ND, W_MD, b_M, budgets_M), 70)
    torch.testing.assert_close(got_NM, (x_ND @ W_MD.T + b_M).relu(), rtol=1e-5, atol=1e-5)


@on_every_device
def test_ties_are_cut_at_the_budget_and_choices_repeat(device):
    x_ND, W_MD, b_M = torch.ones(40, 3), torch.ones(20, 3), torch.zeros(20)
    budgets_M = torch.arange(20)
    of_ties = [t.to(device) for t in (x_ND, W_MD, b_M, budgets_M)]
    first, second = feature_choice_encode(*of_ties), feature_choice_encode(*of_ties)
    assert torch.equal(torch.bincount(first[1], minlength=20).cpu(), budgets_M)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_every_device
def test_a_low_precision_scan_only_proposes(device):
    x_ND, W_MD, b_M, _ = problem(300, 32, 200, 1, device)
    budgets_M = torch.arange(200, device=device) % 30
    got = feature_choice_encode_eager(x_ND, W_MD, b_M, budgets_M, scan_dtype=torch.bfloat16)
    got_NM, pre_NM = dense(*got, 200), x_ND @ W_MD.T + b_M
    kept_NM = got_NM > 0
    assert torch.equal(kept_NM.sum(0), budgets_M)
    torch.testing.assert_close(got_NM[kept_NM], pre_NM[kept_NM], rtol=1e-5, atol=1e-5)
    # Nothing clearly better than what was picked was passed over: bf16 has 8 bits, pre-activations are ~ 6.
    missed_M = pre_NM.masked_fill(kept_NM, -torch.inf).max(0).values
    assert (missed_M <= pre_NM.masked_fill(~kept_NM, torch.inf).min(0).values + 0.25).all()
