"""topk_encode and the sparse sums against dense references, over odd shapes, on every device."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench_kernels import Entries, gathered_dots, group_by_latent, latent_sums, sparse_decode
from saebench_kernels.topk_encode import topk_encode_eager as topk_encode

sizes = st.tuples(
    st.integers(1, 37), st.integers(1, 19), st.integers(1, 53), st.integers(1, 53), st.integers(0, 999)
)
"""N, D, M, k, seed."""


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
on_every_device = pytest.mark.parametrize("device", DEVICES)


def _problem(n, d, m, k, seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    x_ND, W_MD, b_M = (torch.randn(shape, generator=generator).to(device) for shape in ((n, d), (m, d), (m,)))
    return x_ND, W_MD, b_M, min(k, m)


@on_every_device
@settings(max_examples=60, deadline=None)
@given(size=sizes)
def test_topk_encode_keeps_the_k_largest_positive_pre_activations(device, size):
    x_ND, W_MD, b_M, k = _problem(*size, device)
    values_NK, indices_NK = topk_encode(x_ND, W_MD, b_M, k)
    pre_NM = x_ND.double() @ W_MD.double().T + b_M.double()
    expected_NK = pre_NM.topk(k, dim=1).values.relu()
    torch.testing.assert_close(
        values_NK.double().sort(1, descending=True).values, expected_NK, rtol=1e-5, atol=1e-5
    )
    picked_NK = pre_NM.gather(1, indices_NK).relu()
    torch.testing.assert_close(values_NK.double(), picked_NK, rtol=1e-5, atol=1e-5)
    assert all(len(set(row.tolist())) == k for row in indices_NK)


def test_topk_encode_is_the_same_over_chunks_of_rows(monkeypatch):
    x_ND, W_MD, b_M, k = _problem(101, 8, 40, 5, 0)
    whole = topk_encode(x_ND, W_MD, b_M, k)[0].sort(1).values
    monkeypatch.setattr(sys.modules[topk_encode.__module__], "_CPU_CHUNK_ELEMENTS", 7 * 40)
    torch.testing.assert_close(topk_encode(x_ND, W_MD, b_M, k)[0].sort(1).values, whole)


@on_every_device
def test_a_low_precision_scan_only_proposes(device):
    x_ND, W_MD, b_M, k = _problem(64, 32, 200, 8, 1, device)
    values_NK, indices_NK = topk_encode(x_ND, W_MD, b_M, k, scan_dtype=torch.bfloat16)
    pre_NM = x_ND @ W_MD.T + b_M
    torch.testing.assert_close(values_NK, pre_NM.gather(1, indices_NK).relu(), rtol=1e-5, atol=1e-5)
    # Nothing clearly better than what was picked was passed over: bf16 has 8 bits, pre-activations are ~ 6.
    missed_NM = pre_NM.scatter(1, indices_NK, -torch.inf)
    assert (missed_NM.max(1).values <= values_NK.min(1).values + 0.25).all()


def test_rows_without_positive_pre_activations_are_all_padding():
    values_NK, _ = topk_encode(torch.zeros(3, 4), torch.ones(10, 4), -torch.ones(10), 5)
    assert (values_NK == 0).all()


@on_every_device
@settings(max_examples=60, deadline=None)
@given(size=sizes)
def test_decode_and_its_gradients_equal_the_dense_products(device, size):
    x_ND, W_MD, b_M, k = _problem(*size, device)
    values_NK, indices_NK = topk_encode(x_ND, W_MD, b_M, k)
    lengths_N = torch.randint(0, k + 1, (len(x_ND),), generator=torch.Generator().manual_seed(size[-1]))
    kept_NK = torch.arange(k) < lengths_N[:, None]
    kept_NK = kept_NK.to(device)
    indices_S, values_S, rows_S = indices_NK[kept_NK], values_NK[kept_NK], kept_NK.nonzero()[:, 0]
    starts_N = (lengths_N.cumsum(0) - lengths_N).to(device)
    dense_NM = x_ND.new_zeros(len(x_ND), len(W_MD))
    dense_NM[rows_S, indices_S] = values_S
    offsets = torch.nn.functional.pad(lengths_N.cumsum(0), (1, 0)).to(device)
    entries = Entries(indices_S.int(), len(W_MD), len(x_ND), offsets=offsets)
    decoded_ND = sparse_decode(values_S, entries, W_MD, x_ND[0])
    torch.testing.assert_close(decoded_ND, dense_NM @ W_MD + x_ND[0], rtol=1e-4, atol=1e-4)
    dots_S = gathered_dots(indices_S, starts_N, x_ND, W_MD)
    torch.testing.assert_close(dots_S, (x_ND @ W_MD.T)[rows_S, indices_S], rtol=1e-4, atol=1e-4)
    groups = group_by_latent(indices_S, rows_S, len(W_MD))
    torch.testing.assert_close(latent_sums(groups, values_S, x_ND), dense_NM.T @ x_ND, rtol=1e-4, atol=1e-4)


@on_every_device
@pytest.mark.parametrize("threads", [1, 2])
def test_everything_repeats_bit_for_bit(device, threads):
    x_ND, W_MD, b_M, k = _problem(500, 64, 300, 16, 3, device)

    def all_ops():
        values_NK, indices_NK = topk_encode(x_ND, W_MD, b_M, k)
        starts_N = torch.arange(500, device=device) * 16
        indices_S, values_S, rows_S = indices_NK.flatten(), values_NK.flatten(), starts_N.div(16).long()
        groups = group_by_latent(indices_S, rows_S.repeat_interleave(16), 300)
        return (
            values_S,
            sparse_decode(values_S, Entries(indices_S.int(), 300, 500, k=16), W_MD, x_ND[0]),
            gathered_dots(indices_S, starts_N, x_ND, W_MD),
            latent_sums(groups, values_S, x_ND),
        )

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, *others = [all_ops() for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
