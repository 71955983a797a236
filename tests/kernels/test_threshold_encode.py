"""Entries above a threshold, against the dense definition, over odd shapes and every scan type."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench_kernels.threshold_encode import threshold_encode_eager as threshold_encode

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
on_every_device = pytest.mark.parametrize("device", DEVICES)


def problem(n, d, m, seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, d), (m, d), (m,), (m,))
    return tuple(torch.randn(shape, generator=generator).to(device) for shape in shapes)


def dense(found, n, m):
    """[n, m] with the values found; also checks their order and the offsets."""
    values_S, indices_S, offsets = found
    assert values_S.dtype == torch.float32 and indices_S.dtype == offsets.dtype == torch.int64
    assert offsets[0] == 0 and offsets[-1] == len(values_S) and len(offsets) == n + 1
    rows_S = torch.repeat_interleave(offsets.diff())
    assert ((rows_S * m + indices_S).diff() > 0).all()
    return values_S.new_zeros(n, m).index_put((rows_S, indices_S), values_S)


@on_every_device
@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 37),
    st.integers(1, 19),
    st.integers(1, 53),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_it_keeps_what_is_positive_and_above_the_threshold(device, n, d, m, low_precision, one_for_all, seed):
    x_ND, W_MD, b_M, threshold_M = problem(n, d, m, seed, device)
    threshold = threshold_M[0] if one_for_all else threshold_M
    scan_dtype = torch.bfloat16 if low_precision else torch.float32
    found = threshold_encode(x_ND, W_MD, b_M, threshold, scan_dtype=scan_dtype)
    pre_NM = x_ND.double() @ W_MD.double().T + b_M.double()
    kept_NM = (pre_NM > threshold) & (pre_NM > 0)
    torch.testing.assert_close(
        dense(found, n, m).double(), torch.where(kept_NM, pre_NM, 0), rtol=1e-4, atol=1e-4
    )
    certain_NM = (pre_NM - threshold.clamp_min(0)).abs() > 1e-4
    assert torch.equal((dense(found, n, m) > 0)[certain_NM], kept_NM[certain_NM])


def test_the_comparison_is_strict_and_nothing_negative_is_kept():
    x_ND, W_MD = torch.tensor([[1.0], [2.0], [-1.0]]), torch.ones(1, 1)
    for threshold, expected in ((1.0, [2.0]), (0.999, [1.0, 2.0]), (-5.0, [1.0, 2.0]), (torch.inf, [])):
        for scan_dtype in (torch.float32, torch.bfloat16, torch.float16):
            values_S, _, _ = threshold_encode(
                x_ND, W_MD, torch.zeros(1), torch.tensor(threshold), scan_dtype=scan_dtype
            )
            assert values_S.tolist() == expected
    assert threshold_encode(x_ND, W_MD, torch.tensor([1.0]), torch.tensor(-5.0))[0].tolist() == [2.0, 3.0]


@on_every_device
@pytest.mark.parametrize("scan_dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_scan_misses_nothing_even_where_rounding_is_large(device, scan_dtype):
    """Rows and latents of very different norm (one of norm 0), thresholds where many entries lie near."""
    x_ND, W_MD, b_M, _ = problem(200, 512, 300, 0, device)
    x_ND = x_ND * torch.logspace(-1, 1, 200, device=device)[:, None]
    W_MD = W_MD * torch.logspace(-3, 3, 300, device=device)[:, None]
    W_MD[7] = 0
    threshold_M = W_MD.norm(dim=1) + b_M.abs()
    whole = threshold_encode(x_ND, W_MD, b_M, threshold_M)
    got = threshold_encode(x_ND, W_MD, b_M, threshold_M, scan_dtype=scan_dtype)
    whole_NM, got_NM = dense(whole, 200, 300), dense(got, 200, 300)
    pre_NM = x_ND.double() @ W_MD.double().T + b_M
    certain_NM = (pre_NM - threshold_M.clamp_min(0)).abs() > 1e-4 * (1 + W_MD.norm(dim=1))
    assert torch.equal((got_NM > 0)[certain_NM], (whole_NM > 0)[certain_NM])
    torch.testing.assert_close(got_NM, torch.where(got_NM > 0, pre_NM, 0).float(), rtol=1e-4, atol=1e-2)


def test_chunks_of_rows_and_repetition_change_nothing(monkeypatch):
    x_ND, W_MD, b_M, threshold_M = problem(101, 8, 40, 0)
    for scan_dtype in (torch.float32, torch.bfloat16):
        whole = threshold_encode(x_ND, W_MD, b_M, threshold_M, scan_dtype=scan_dtype)
        again = threshold_encode(x_ND, W_MD, b_M, threshold_M, scan_dtype=scan_dtype)
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
        with monkeypatch.context() as patched:
            patched.setattr(sys.modules[threshold_encode.__module__], "_CPU_CHUNK_ELEMENTS", 7 * 40)
            parts = threshold_encode(x_ND, W_MD, b_M, threshold_M, scan_dtype=scan_dtype)
        torch.testing.assert_close(dense(parts, 101, 40), dense(whole, 101, 40))
