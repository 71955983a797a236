"""Reconstruction metrics against a direct computation in float64 numpy."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from saebench.core.codes import SparseCodes
from saebench.core.errors import UserError
from saebench.evaluation.reconstruction import ReconstructionMeter, fires, reconstruction_metrics
from saebench.saes.spec import SaeSpec


class Linear:
    """A dense relu autoencoder with the interface of an SAE."""

    def __init__(self, W_enc: torch.Tensor, W_dec: torch.Tensor, b_dec: torch.Tensor) -> None:
        self.W_enc, self.W_dec, self.b_dec = W_enc, W_dec, b_dec
        self.d_in, self.d_sae = W_enc.shape
        self.d_out, self.spec = self.d_in, SaeSpec()

    def encode(self, x: torch.Tensor) -> SparseCodes:
        z_NM = ((x - self.b_dec) @ self.W_enc).relu()
        return SparseCodes.from_topk(z_NM, torch.arange(self.d_sae).expand_as(z_NM), d_sae=self.d_sae)

    def decode(self, codes: SparseCodes, x: torch.Tensor | None = None) -> torch.Tensor:
        return codes.to_dense() @ self.W_dec + self.b_dec


def random_sae(d_in: int, d_sae: int, seed: int = 0) -> Linear:
    g = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(d_in, d_sae, generator=g)
    return Linear(W_enc, torch.randn(d_sae, d_in, generator=g) / d_sae, torch.randn(d_in, generator=g))


def identity(d_in: int) -> Linear:
    """Reproduces its input: one latent for each sign of each dimension."""
    eye = torch.eye(d_in)
    return Linear(torch.cat([eye, -eye], 1), torch.cat([eye, -eye]), torch.zeros(d_in))


def constant(b_dec: torch.Tensor, d_sae: int = 4) -> Linear:
    """Never fires and always outputs ``b_dec``."""
    return Linear(torch.zeros(len(b_dec), d_sae), torch.zeros(d_sae, len(b_dec)), b_dec)


@given(seed=st.integers(0, 2**16), n=st.integers(2, 60), d_in=st.integers(1, 9), d_sae=st.integers(1, 17))
@settings(deadline=None, max_examples=40)
def test_metrics_equal_direct_float64_computation(seed: int, n: int, d_in: int, d_sae: int) -> None:
    sae = random_sae(d_in, d_sae, seed)
    x = torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed + 1)) + 3
    got = reconstruction_metrics(sae, [x])

    codes = sae.encode(x)
    z = codes.to_dense().numpy()
    x64, x_hat64 = x.double().numpy(), sae.decode(codes).double().numpy()
    fvu = ((x64 - x_hat64) ** 2).sum() / ((x64 - x64.mean(0)) ** 2).sum()
    cosine = (x64 * x_hat64).sum(1) / (np.linalg.norm(x64, axis=1) * np.linalg.norm(x_hat64, axis=1))
    assert got.n_tokens == n
    assert got.fvu == pytest.approx(fvu, rel=1e-9)
    assert got.explained_variance == pytest.approx(1 - fvu, rel=1e-9, abs=1e-9)
    assert got.cosine_similarity == pytest.approx(cosine.mean(), rel=1e-9, abs=1e-12)
    assert got.l0 == pytest.approx((z != 0).sum(1).mean())
    assert got.l0 == pytest.approx(codes.l0().double().mean().item())
    assert got.dead_fraction == pytest.approx((z == 0).all(0).mean())
    np.testing.assert_allclose(got.density.numpy(), (z != 0).mean(0))


@given(
    cuts=st.lists(st.integers(0, 200), max_size=8),
    mean=st.sampled_from([0.0, 1e3, -1e4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(deadline=None, max_examples=30)
def test_batch_sizes_do_not_change_metrics(cuts: list[int], mean: float, dtype: torch.dtype) -> None:
    x = (100 * torch.randn(200, 5, generator=torch.Generator().manual_seed(7)) + mean).to(dtype)
    sae = constant(torch.full((5,), mean) + 0.1)
    whole = reconstruction_metrics(sae, [x])
    bounds = [0, *sorted(cuts), 200]
    parts = reconstruction_metrics(sae, [x[a:b] for a, b in pairwise(bounds)])
    for name in ("n_tokens", "fvu", "explained_variance", "l0", "dead_fraction", "cosine_similarity"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-9), name
    assert torch.equal(parts.density, whole.density)


def test_identity_sae_explains_all_variance() -> None:
    got = reconstruction_metrics(identity(6), [torch.randn(50, 6)])
    assert (got.fvu, got.explained_variance) == (0, 1)
    assert got.cosine_similarity == pytest.approx(1, abs=1e-12)
    assert got.l0 == pytest.approx(6, abs=1e-12)


def test_sae_that_outputs_mean_explains_no_variance() -> None:
    x = torch.arange(24.0).view(8, 3)  # small integers: the mean is exact in fp32
    got = reconstruction_metrics(constant(x.mean(0)), [x])
    assert got.explained_variance == pytest.approx(0, abs=1e-12)
    assert (got.l0, got.dead_fraction) == (0, 1)


def test_variance_is_exact_if_mean_is_far_larger_than_deviation() -> None:
    x = torch.tensor([[2.0**20], [2.0**20 + 1]])
    got = reconstruction_metrics(constant(torch.tensor([2.0**20])), [x])
    assert got.fvu == 2.0  # error 1, variance 2 * (1/2)^2


def test_latent_picked_twice_for_a_row_counts_once_and_padding_never() -> None:
    values = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [3.0, 1.0, -1.0]])
    indices = torch.tensor([[2, 2, 0], [1, 1, 1], [0, 2, 0]])
    codes = SparseCodes.from_topk(values, indices, d_sae=4)
    assert fires(codes).tolist() == [1, 0, 2, 0]


def test_given_codes_are_measured_instead_of_encoded_ones() -> None:
    x = torch.randn(50, 3)
    meter = ReconstructionMeter(identity(3))
    none = SparseCodes.from_topk(torch.zeros(50, 1), torch.zeros(50, 1).int(), d_sae=6)
    meter.update(x, none)
    assert meter.result().fvu >= 1 and meter.result().l0 == 0


@given(hnp.arrays(np.int64, st.integers(1, 40), elements=st.integers(0, 1000)))
@settings(deadline=None, max_examples=40)
def test_histogram_puts_each_latent_in_one_bin_or_dead(counts: np.ndarray) -> None:
    n = 1000
    metrics = reconstruction_metrics(identity(1), [torch.arange(4.0)[:, None]])
    metrics = type(metrics)(**{**metrics.__dict__, "n_tokens": n, "density": torch.from_numpy(counts / n)})
    histogram = metrics.density_histogram()
    assert sum(histogram.counts) + histogram.dead == len(counts)
    assert histogram.dead == (counts == 0).sum()
    assert (histogram.edges[0], histogram.edges[-1], len(histogram.counts)) == (-3, 0, 12)
    for low, high, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False):
        inside = (counts > 0) & (counts / n > 10**low * 1.001) & (counts / n < 10**high * 0.999)
        assert inside.sum() <= count


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_activation_that_is_not_finite_is_refused_with_its_row(bad: float) -> None:
    x = torch.randn(20, 3)
    x[13, 1] = bad
    with pytest.raises(UserError, match="activation of evaluated row 13 "):
        reconstruction_metrics(identity(3), [x[:8], x[8:]])


def test_sae_with_nan_weights_is_refused() -> None:
    with pytest.raises(UserError, match="reconstruction of evaluated row 0 "):
        reconstruction_metrics(constant(torch.tensor([math.nan])), [torch.randn(4, 1)])


@pytest.mark.parametrize("batches", [[], [torch.ones(1, 3)], [torch.full((9, 3), 1e6)]])
def test_rows_without_variance_are_refused(batches: list[torch.Tensor]) -> None:
    with pytest.raises(UserError, match="no variance to explain"):
        reconstruction_metrics(identity(3), batches)


@pytest.mark.parametrize("step", [1, 7, 400, 5000])
def test_ordinary_rows_are_measured_apart_whatever_the_batch_size(step: int) -> None:
    sae = random_sae(6, 9)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3000, 6, generator=generator) + 3
    massive = torch.rand(3000, generator=generator) < 0.02
    x[massive] += 4000.0
    found = reconstruction_metrics(sae, torch.split(x, step) if step > 1 else [x[:1], x[1:2], x[2:]])
    alone = reconstruction_metrics(sae, [x[~massive]])
    assert found.massive_rows == int(massive.sum()) and alone.massive_rows == 0
    assert found.fvu_ordinary == pytest.approx(alone.fvu, rel=1e-6) and alone.fvu_ordinary is None
    assert found.fvu != pytest.approx(alone.fvu, rel=0.01)
