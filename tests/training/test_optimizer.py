import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saebench.saes.base import Batch
from saebench.saes.topk import TopKSAE, TopKSpec
from saebench.training.optimizer import learning_rate, make_optimizer, optimizer_step, peak_learning_rate
from saebench.training.settings import TrainConfig


def config(**settings):
    return TrainConfig(cache="c", out="o", **settings)


@given(st.integers(1, 5000), st.floats(0, 0.5), st.floats(0, 0.5))
def test_learning_rate_rises_stays_and_falls_and_is_never_zero(n_steps, warmup, decay):
    schedule = config(warmup=warmup, decay=decay)
    rates = [learning_rate(schedule, peak=1.0, step=s, n_steps=n_steps) for s in range(n_steps)]
    assert all(0 < rate <= 1 for rate in rates)
    top = rates.index(max(rates))
    assert all(a <= b for a, b in itertools.pairwise(rates[: top + 1]))
    assert all(a >= b for a, b in itertools.pairwise(rates[top:]))


def test_auto_learning_rate_falls_with_width():
    assert peak_learning_rate(config(), 4096) == 1.6e-3
    assert math.isclose(peak_learning_rate(config(), 16384), 8e-4)
    assert peak_learning_rate(config(lr=0.1), 16384) == 0.1


def test_step_equals_project_clip_adam_normalize():
    """Against torch's own Adam with every part written out."""
    torch.manual_seed(0)
    x_ND = torch.randn(50, 8)
    sae, twin = (TopKSAE(TopKSpec(d_sae=20, k=3), 8) for _ in range(2))
    for s in (sae, twin):
        s.initialize(Batch(x_ND), seed=0)
    optimizer = make_optimizer(sae)
    reference = torch.optim.Adam(twin.parameters(), lr=0.01, eps=6.25e-10)
    for _ in range(5):
        for s, o in ((sae, optimizer), (twin, reference)):
            o.zero_grad()
            s.loss(Batch(x_ND)).total.backward()
        norm = optimizer_step(sae, optimizer, lr=0.01, grad_clip=0.05)
        atoms_MD = twin.W_dec.detach()
        twin.W_dec.grad -= (twin.W_dec.grad * atoms_MD).sum(1, keepdim=True) * atoms_MD
        total = torch.cat([p.grad.flatten() for p in twin.parameters()]).norm()
        torch.testing.assert_close(norm, total)
        for p in twin.parameters():
            p.grad *= min(1.0, 0.05 / (total + 1e-6))
        reference.step()
        with torch.no_grad():
            twin.W_dec /= twin.W_dec.norm(dim=1, keepdim=True)
        for name in sae.weight_names:
            torch.testing.assert_close(getattr(sae, name), getattr(twin, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_a_step_that_is_not_finite_is_not_applied_and_neither_is_any_after_it(device):
    sae = TopKSAE(TopKSpec(d_sae=20, k=3), 8).to(device)
    x_ND = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).to(device)
    sae.initialize(Batch(x_ND), seed=0)
    optimizer, is_finite = make_optimizer(sae), torch.ones((), dtype=torch.bool, device=device)

    def step(rows_ND):
        optimizer.zero_grad()
        sae.loss(Batch(rows_ND)).total.backward()
        optimizer_step(sae, optimizer, lr=0.01, grad_clip=1.0, is_finite=is_finite)
        moments = [optimizer.state[p]["exp_avg"].clone() for p in sae.parameters()]
        return [p.detach().clone() for p in sae.parameters()] + moments

    good = step(x_ND)
    assert is_finite
    broken = x_ND.clone()
    broken[3, 3] = float("nan")
    for rows_ND in (broken, x_ND):
        for before, after in zip(good, step(rows_ND), strict=True):
            torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
        assert not is_finite
