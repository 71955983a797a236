from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kurtosis

from saebench.store import geometry, logits
from saebench.store.geometry import directions, nearest_rows, neighbor_rows
from saebench.store.logits import logit_rows


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 20), st.integers(1, 2000), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_neighbors_equal_brute_force(d_sae, d_in, n, block_bytes, seed):
    W_dec = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "BLOCK_BYTES", block_bytes)
        other, cosine = nearest_rows(W_dec, n)
    full = torch.nn.functional.cosine_similarity(W_dec[:, None], W_dec[None], dim=-1)
    assert other.shape == (d_sae, min(n, d_sae - 1))
    full.fill_diagonal_(-2)
    torch.testing.assert_close(cosine, full.sort(dim=1, descending=True).values[:, : other.shape[1]])
    torch.testing.assert_close(full.gather(1, other), cosine)
    rows = neighbor_rows("encoder", other, cosine)
    assert all(rows["feature"] != rows["other"])


def test_zero_rows_have_zero_cosine():
    W_dec = torch.tensor([[1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    other, cosine = nearest_rows(W_dec, 2)
    assert (other[0, 0], cosine[0, 0]) == (2, 1)
    assert cosine[1].tolist() == [0, 0]
    found = directions(W_dec, W_dec)
    np.testing.assert_allclose(found["dec_norm"], [1, 0, 2])
    np.testing.assert_allclose(found["enc_dec_cos"], [1, 0, 1])


@given(st.integers(1, 20), st.integers(1, 30), st.integers(1, 12), st.integers(1, 3000), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_logits_equal_brute_force(d_sae, n_tokens, n, block_bytes, seed):
    generator = torch.Generator().manual_seed(seed)
    W_dec, W_U = torch.randn(d_sae, 5, generator=generator), torch.randn(5, n_tokens, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logits, "BLOCK_BYTES", block_bytes)
        rows, columns = logit_rows(W_dec, W_U, n)
    full = (W_dec @ W_U).numpy()
    np.testing.assert_allclose(columns["logit_max"], full.max(1), rtol=1e-4, atol=1e-5)
    expected = [kurtosis(row) if np.ptp(row) else 0 for row in full.astype(np.float64)]
    np.testing.assert_allclose(columns["logit_kurtosis"], expected, rtol=1e-3, atol=1e-3)
    for feature in range(d_sae):
        for sign in (1, -1):
            here = (rows["feature"] == feature) & (rows["sign"] == sign)
            assert rows["rank"][here].tolist() == list(range(min(n, n_tokens)))
            np.testing.assert_allclose(
                sign * np.sort(sign * full[feature])[::-1][:n], rows["value"][here], rtol=1e-4, atol=1e-5
            )
            np.testing.assert_allclose(
                full[feature][rows["token"][here]], rows["value"][here], rtol=1e-4, atol=1e-5
            )
