"""crosscoder_sites on weights with planted norms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.analysis.crosscoders import crosscoder_sites
from saebench.core.errors import UserError
from saebench.saes.spec import SiteWidth
from saebench.saes.topk import TopKSAE
from tests.conftest import TINY_HOOKS


def crosscoder(shares_MS, widths, std, seed):
    """A crosscoder whose latents have these shares of the norm at sites of these standard deviations."""
    sites = tuple(SiteWidth(name, width) for name, width in widths.items())
    sae = TopKSAE(TopKSAE.Spec(d_sae=len(shares_MS), k=1, sites=sites, targets=sites), sum(widths.values()))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for at, part in enumerate(sae.split(sae.W_dec, of=sites).values()):
            rows = torch.nn.functional.normalize(torch.randn(part.shape, generator=generator))
            part.copy_(rows * shares_MS[:, at : at + 1] * std[at])
    return sae


@given(
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=8),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 9),
)
@settings(max_examples=25, deadline=None)
def test_planted_shares_are_found_whatever_the_scale_of_a_latent(tiny_cache, shares, scale, seed):
    names = TINY_HOOKS
    std = [float(tiny_cache.activations(n)[::1].double().var(0, correction=0).mean().sqrt()) for n in names]
    last_M = torch.tensor(shares)
    sae = crosscoder(scale * torch.stack([1 - last_M, last_M], 1), dict.fromkeys(names, 32), std, seed)
    found = crosscoder_sites(sae, tiny_cache)
    np.testing.assert_allclose(found[f"share {names[1]}"], last_M, atol=0.02)  # std is that of a sample
    np.testing.assert_allclose(found[f"share {names[0]}"] + found[f"share {names[1]}"], 1, rtol=1e-5)
    for share, kind in zip(shares, found["kind"], strict=True):
        if abs(share - 0.5) < 0.18:
            assert kind == "shared"
        elif abs(share - 0.5) > 0.22:
            assert kind == f"only {names[share > 0.5]}"


def test_cosine_of_sites_and_latents_that_write_nothing(tiny_cache):
    sae = crosscoder(torch.ones(3, 2), dict.fromkeys(TINY_HOOKS, 32), [1.0, 1.0], 0)
    with torch.no_grad():
        sae.W_dec[0, 32:] = -2 * sae.W_dec[0, :32]
        sae.W_dec[1] = 0
    found = crosscoder_sites(sae, tiny_cache)
    assert found["site_cos"][0] == pytest.approx(-1)
    assert found["kind"][1] == "none" and np.isnan(found[f"share {TINY_HOOKS[0]}"][1])


def test_what_is_no_crosscoder_is_refused(tiny_cache, run):
    with pytest.raises(UserError, match="is not a crosscoder"):
        crosscoder_sites(run)
    sae = crosscoder(torch.ones(3, 2), {TINY_HOOKS[0]: 32, "elsewhere": 7}, [1.0, 1.0], 0)
    with pytest.raises(UserError, match="has no elsewhere"):
        crosscoder_sites(sae, tiny_cache)
    with pytest.raises(UserError, match=r"threshold is 0\.2"):
        crosscoder_sites(sae, tiny_cache, threshold=0.2)
