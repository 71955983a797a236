"""Correlations from sparse codes against numpy on dense arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.analysis import correlations
from saebench.analysis.correlations import Correlations
from saebench.core.codes import SparseCodes


def random_codes(n: int, d_sae: int, k: int, seed: int) -> SparseCodes:
    """[n] rows with k picks each, some of them repeated."""
    generator = torch.Generator().manual_seed(seed)
    index_NK = torch.randint(d_sae, (n, k), generator=generator)
    return SparseCodes.from_topk(torch.rand(n, k, generator=generator), index_NK, d_sae=d_sae)


def part(codes: SparseCodes, rows: slice) -> SparseCodes:
    indices_NK, values_NK = codes.rectangular()
    return SparseCodes.from_topk(values_NK[rows], indices_NK[rows], d_sae=codes.d_sae)


@given(
    n_a=st.integers(1, 9), n_b=st.integers(1, 9), n=st.integers(2, 60), size=st.integers(1, 60),
    k=st.integers(1, 4), seed=st.integers(0, 999), block=st.sampled_from([1, 300, 2**27]),
)  # fmt: skip
@settings(deadline=None)
def test_sparse_correlations_equal_numpy(
    n_a: int, n_b: int, n: int, size: int, k: int, seed: int, block: int
) -> None:
    a, b = random_codes(n, n_a, k, seed), random_codes(n, n_b, k, seed + 1)
    sums = Correlations(n_a, n_b)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(correlations, "BLOCK_BYTES", block)
        for start in range(0, n, size):
            rows = slice(start, start + size)
            sums.add(part(a, rows), part(b, rows))
    dense_a, dense_b = a.to_dense().double().numpy(), b.to_dense().double().numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = np.corrcoef(dense_a.T, dense_b.T)[:n_a, n_a:]
    constant = (np.ptp(dense_a, 0) == 0)[:, None] | (np.ptp(dense_b, 0) == 0)
    np.testing.assert_allclose(sums.result(), np.where(constant, 0, expected), atol=1e-6)
