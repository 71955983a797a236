"""Reconstruction and weight gradients from sparse codes, against dense products in float64."""

import pytest
import torch

from saebench_kernels.fused.reconstruct import reconstruct
from saebench_kernels.fused.weight_grads import CHUNK, sort_pairs, weight_grads
from tests.kernels.fused.problems import DEVICE, HALVES, ON_GPU

SHAPES = [
    (1, 1, 1, 1),
    (9, 24, 70, 3),
    (7, 33, 40, 17),
    (3, 16, 100, 80),
    (300, 8, 3, 2),
    *([(8192, 768, 24576, 32), (1000, 2304, 5000, 64), (517, 769, 999, 100)] * ON_GPU),
]
"""N, D, M, k."""


def _codes(n, d, m, k, dtype):
    generator = torch.Generator().manual_seed(0)
    indices_NK = torch.randint(0, m, (n, k), generator=generator)  # repeats add up
    indices_NK[:, 0] = indices_NK[:, 0] % max(1, m // 100)  # some latents have many tokens
    values_NK = torch.randn(n, k, generator=generator).relu()
    x_ND, W_MD, b_D = (torch.randn(shape, generator=generator) for shape in ((n, d), (m, d), (d,)))
    to = {"device": DEVICE}
    return (
        indices_NK.to(torch.int32).to(**to),
        values_NK.to(**to),
        x_ND.to(**to),
        W_MD.to(dtype).to(**to),
        b_D.to(**to),
    )


def _dense(indices_NK, values_NK, m):
    dense_NM = torch.zeros(len(indices_NK), m, dtype=torch.float64, device=DEVICE)
    return dense_NM.scatter_add_(1, indices_NK.long(), values_NK.double())


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", SHAPES)
def test_reconstruction_error_its_square_and_its_products(shape, dtype, ragged):
    n, _, m, k = shape
    indices_NK, values_NK, x_ND, W_MD, b_D = _codes(*shape, dtype)
    offsets = torch.arange(n + 1, device=DEVICE) * k
    indices_S, values_S = indices_NK.flatten(), values_NK.flatten()
    rows_S = torch.arange(n, device=DEVICE).repeat_interleave(k)
    if ragged:
        kept_S = torch.rand(len(rows_S), generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.7
        indices_S, values_S, rows_S = indices_S[kept_S], values_S[kept_S], rows_S[kept_S]
        offsets = torch.searchsorted(rows_S, torch.arange(n + 1, device=DEVICE))
        values_NK = torch.where(kept_S.view(n, k), values_NK, 0)
    how = {"offsets": offsets} if ragged else {"k": k}
    error_ND, squared_N, dots_S = reconstruct(indices_S, values_S, x_ND, W_MD, b_D, **how)
    exact_ND = x_ND.double() - b_D.double() - _dense(indices_NK, values_NK, m) @ W_MD.double()
    assert error_ND.dtype == dtype
    eps, scale = torch.finfo(dtype).eps, exact_ND.abs().max() + 1
    torch.testing.assert_close(error_ND.double(), exact_ND, rtol=2 * eps, atol=float(scale * 1e-5))
    torch.testing.assert_close(squared_N.double(), exact_ND.square().sum(1), rtol=1e-4, atol=1e-4)
    exact_S = (exact_ND[rows_S] * W_MD.double()[indices_S.long()]).sum(1)
    size = float(exact_ND.norm(dim=1).max() * W_MD.double().norm(dim=1).max())
    torch.testing.assert_close(dots_S.double(), exact_S, rtol=0, atol=size * max(eps, 1e-5))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", SHAPES)
def test_weight_gradients_equal_dense_products(shape, dtype, ragged):
    n, _, m, k = shape
    indices_NK, values_NK, x_ND, _, _ = _codes(*shape, dtype)
    table_ND, other_ND = x_ND.to(dtype), x_ND.flip(0).to(dtype)
    dots_NK = torch.randn(n, k, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    rows_S = torch.arange(n, device=DEVICE).repeat_interleave(k)
    pairs = (
        sort_pairs(indices_NK.flatten(), m, rows_S=rows_S)
        if ragged
        else sort_pairs(indices_NK.flatten(), m, k=k)
    )
    scale = torch.tensor(-0.5, device=DEVICE)
    found, again = (
        weight_grads(pairs, values_NK.flatten(), dots_NK.flatten(), table_ND, other_ND, scale)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    values_NM = -0.5 * _dense(indices_NK, values_NK, m)
    dots_NM = -0.5 * _dense(indices_NK, torch.where(values_NK > 0, dots_NK, 0), m)
    exact = (values_NM.T @ table_ND.double(), dots_NM.T @ other_ND.double(), dots_NM.sum(0))
    for mine, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4 * (1 + n / m) ** 0.5)


def test_a_latent_of_many_tokens_is_cut_into_chunks():
    n = 3 * CHUNK + 7
    indices_S = torch.zeros(n, dtype=torch.int32, device=DEVICE)
    indices_S[-1] = 2
    pairs = sort_pairs(indices_S, 3, k=1)
    assert pairs.starts.tolist() == [0, n - 1, n - 1, n]
    assert pairs.extra.tolist() == [0, 3, 3, 3]
    assert pairs.owner_C.tolist() == [0, 0, 0]
    ones_N1, one = torch.ones(n, 1, device=DEVICE), torch.ones((), device=DEVICE)
    d_dec_M1, _, d_b_M = weight_grads(pairs, ones_N1[:, 0], ones_N1[:, 0], ones_N1, ones_N1, one)
    assert d_dec_M1.flatten().tolist() == d_b_M.tolist() == [n - 1, 0, 1]
