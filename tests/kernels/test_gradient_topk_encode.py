"""gradient_topk_encode: the choice by value times influence against its dense definition, on the CPU and on a
GPU."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench_kernels.gradient_topk_encode import gradient_topk_encode_eager as gradient_topk_encode
from saebench_kernels.topk_encode import topk_encode_eager as topk_encode

on_every_device = pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
sizes = st.tuples(
    st.integers(1, 37), st.integers(1, 19), st.integers(1, 53), st.integers(1, 53), st.integers(0, 999)
)
"""N, D, M, k, seed."""


def problem(n, d, m, k, seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, d), (n, d), (m, d), (m, d), (m,))
    return *(torch.randn(shape, generator=generator).to(device) for shape in shapes), min(k, m)


@on_every_device
@settings(max_examples=60, deadline=None)
@given(size=sizes, weight=st.sampled_from([0.0, 0.1, 1.0, 1e3]))
def test_the_values_at_the_largest_scores(device, size, weight):
    x_ND, g_ND, W_enc_MD, W_dec_MD, b_M, k = problem(*size, device)
    values_NK, indices_NK = gradient_topk_encode(x_ND, g_ND, W_enc_MD, W_dec_MD, b_M, k, weight)
    z_NM = (x_ND.double() @ W_enc_MD.double().T + b_M).relu()
    score_NM = z_NM * (1 + weight * (g_ND.double() @ W_dec_MD.double().T).abs())
    torch.testing.assert_close(values_NK.double(), z_NM.gather(1, indices_NK), rtol=1e-4, atol=1e-5)
    picked_NK, best_NK = score_NM.gather(1, indices_NK), score_NM.topk(k, dim=1).values
    torch.testing.assert_close(picked_NK.sort(1, descending=True).values, best_NK, rtol=1e-4, atol=1e-4)
    assert all(len(set(row.tolist())) == k for row in indices_NK)


@on_every_device
def test_without_weight_it_is_topk_encode(device):
    x_ND, g_ND, W_enc_MD, W_dec_MD, b_M, k = problem(101, 16, 40, 5, 0, device)
    values_NK, _ = gradient_topk_encode(x_ND, g_ND, W_enc_MD, W_dec_MD, b_M, k, torch.tensor(0.0))
    assert torch.equal(values_NK.sort(1).values, topk_encode(x_ND, W_enc_MD, b_M, k)[0].sort(1).values)


def test_it_is_the_same_over_chunks_of_rows(monkeypatch):
    case = problem(101, 8, 40, 5, 0)
    whole = gradient_topk_encode(*case, 2.0)[0].sort(1).values
    monkeypatch.setattr(sys.modules[gradient_topk_encode.__module__], "_CPU_CHUNK_ELEMENTS", 7 * 40)
    torch.testing.assert_close(gradient_topk_encode(*case, 2.0)[0].sort(1).values, whole)


@on_every_device
def test_a_low_precision_scan_only_proposes(device):
    x_ND, g_ND, W_enc_MD, W_dec_MD, b_M, k = problem(64, 32, 200, 8, 1, device)
    values_NK, indices_NK = gradient_topk_encode(
        x_ND, g_ND, W_enc_MD, W_dec_MD, b_M, k, 1.0, scan_dtype=torch.bfloat16
    )
    z_NM = (x_ND @ W_enc_MD.T + b_M).relu()
    torch.testing.assert_close(values_NK, z_NM.gather(1, indices_NK), rtol=1e-5, atol=1e-5)
    score_NM = z_NM * (1 + (g_ND @ W_dec_MD.T).abs())
    missed_N = score_NM.scatter(1, indices_NK, -torch.inf).max(1).values
    assert (missed_N <= 1.1 * score_NM.gather(1, indices_NK).min(1).values).all()
