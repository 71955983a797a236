"""The adjustment to a mean L0 of k: the controller, calibration, revival, and the k that training ends
with."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.core.codes import SparseCodes
from saebench.core.errors import UserError
from saebench.saes.base import Batch, LossTerms
from saebench.saes.registry import architecture
from saebench.saes.target_l0 import AVERAGED_STEPS, INTEGRAL_GAIN, LARGEST_LOG, PROPORTIONAL_GAIN
from saebench.training.optimizer import learning_rate, make_optimizer, optimizer_step
from saebench.training.settings import TrainConfig
from saebench_kernels import gather_latents

NAMES = ("relu", "gated", "jumprelu")
every_one = pytest.mark.parametrize("name", NAMES)


def sparse_rows(n, *, seed, d_in=16, n_atoms=48):
    """Sums of about five of 48 unit directions, an offset, little noise."""
    generator = torch.Generator().manual_seed(0)
    atoms_MD = torch.nn.functional.normalize(torch.randn(n_atoms, d_in, generator=generator), dim=1)
    generator.manual_seed(seed)
    codes_NM = (torch.rand(n, n_atoms, generator=generator) < 0.1) * (
        1 + torch.rand(n, n_atoms, generator=generator)
    )
    x_ND = codes_NM @ atoms_MD + 0.5 + 0.02 * torch.randn(n, d_in, generator=generator)
    return x_ND / 0.55


def make_sae(name, *, d_sae=64, k=5, seed=0, **settings):
    sae = architecture(name)(architecture(name).Spec(d_sae=d_sae, k=k, **settings), 16)
    sae.initialize(Batch(sparse_rows(2000, seed=100)), seed=seed)
    return sae


def train(sae, *, n_steps):
    """As the trainer does, a learning rate that rises and falls among it; returns mean L0 of each batch."""
    config, optimizer, l0 = TrainConfig(cache=".", out=".", tokens=4096), make_optimizer(sae), []
    for step in range(n_steps):
        batch = Batch(sparse_rows(128, seed=1000 + step), progress=step / n_steps)
        terms = sae.loss(batch)
        optimizer.zero_grad()
        terms.total.backward()
        lr = learning_rate(config, peak=0.01, step=step, n_steps=n_steps)
        optimizer_step(sae, optimizer, lr=lr, grad_clip=1.0)
        sae.after_step(batch, terms)
        l0.append((terms.codes.values != 0).sum().item() / 128)
    return l0


def codes_with_l0(sae, l0):
    """100 rows with ``l0`` active latents each."""
    indices_NK = torch.arange(sae.d_sae).expand(100, -1)
    values_NK = (indices_NK < l0).float()
    return SparseCodes.from_topk(values_NK, indices_NK, d_sae=sae.d_sae)


def tell(sae, l0, times=1):
    zero = torch.zeros(())
    for _ in range(times):
        codes = codes_with_l0(sae, l0)
        sae.after_step(Batch(torch.zeros(100, 16)), LossTerms(zero, zero, zero, codes, zero))


@every_one
@pytest.mark.parametrize(("d_sae", "k", "seed"), [(32, 3, 0), (96, 8, 1)])
def test_k_is_reached_in_training_and_within_5_percent_on_unseen_rows(name, d_sae, k, seed):
    sae = make_sae(name, d_sae=d_sae, k=k, seed=seed)
    l0 = train(sae, n_steps=250)
    assert abs(sum(l0[150:175]) / 25 / k - 1) < 0.15, "before the learning rate falls"
    assert abs(sum(l0[-25:]) / 25 / k - 1) < 0.05, "at the end, before calibration"
    sae.calibrate(sparse_rows(4000, seed=5))
    unseen_ND = sparse_rows(4000, seed=6)
    assert abs(sae.encode(unseen_ND).l0().double().mean() / k - 1) < 0.05
    error = (unseen_ND - sae(unseen_ND)).square().sum() / (unseen_ND - unseen_ND.mean(0)).square().sum()
    assert error < 0.5


@every_one
def test_training_starts_at_k(name):
    sae = make_sae(name, k=7)
    x_ND = sparse_rows(2000, seed=100)
    assert abs(sae.encode(x_ND).l0().double().mean() - 7) < 0.01
    assert 1e-4 < sae.coefficient() < 1


@every_one
def test_the_coefficient_rises_above_k_falls_below_it_and_rests_at_it(name):
    sae = make_sae(name, k=5)
    start = sae.coefficient().item()
    tell(sae, 5, times=50)
    assert sae.coefficient().item() == pytest.approx(start, rel=1e-6)
    tell(sae, 10)
    high = sae.coefficient().item()
    gain = INTEGRAL_GAIN + PROPORTIONAL_GAIN / AVERAGED_STEPS
    assert high == pytest.approx(start * 2**gain, rel=1e-5)
    tell(sae, 10)
    assert sae.coefficient().item() > high > start
    before = sae.log_multiplier.item()
    tell(sae, 6)
    step = INTEGRAL_GAIN * torch.tensor(6 / 5).log().item()
    assert sae.log_multiplier.item() - before == pytest.approx(step, rel=1e-3)
    tell(sae, 2, times=100)
    assert sae.coefficient().item() < start


@every_one
def test_unreachable_k_keeps_all_numbers_finite(name):
    for l0 in (0, 64):
        sae = make_sae(name)
        tell(sae, l0, times=3000)
        assert abs(sae.log_multiplier) == LARGEST_LOG and abs(sae.l0_error) <= 1
        assert sae.loss(Batch(sparse_rows(50, seed=1))).total.isfinite()
        sae.calibrate(sparse_rows(500, seed=2))
        assert all(tensor.isfinite().all() for tensor in sae.state_dict().values())
        assert abs(sae.encode(sparse_rows(500, seed=2)).l0().double().mean() - 5) < 0.01


@every_one
@settings(max_examples=15, deadline=None)
@given(shift=st.floats(-1.5, 1.5), k=st.integers(1, 30), seed=st.integers(0, 99))
def test_calibration_gives_mean_l0_k_from_any_thresholds(name, shift, k, seed):
    sae = make_sae(name, k=k, seed=seed)
    with torch.no_grad():
        sae.raise_thresholds(torch.tensor(shift))
    x_ND = sparse_rows(500, seed=seed)
    sae.calibrate(x_ND)
    l0 = sae.encode(x_ND).l0().double().mean()
    possible = (
        (((x_ND - sae.b_dec) @ sae.W_enc + (0 if name == "gated" else sae.b_enc)) > 0).sum(1).double().mean()
    )
    if name == "relu":
        possible = torch.tensor(64.0)
    assert abs(l0 - min(k, possible)) <= 3 / 500


def test_calibration_moves_all_thresholds_by_one_number():
    x_ND = sparse_rows(500, seed=3)
    relu, gated, jumprelu = (make_sae(name) for name in NAMES)
    with torch.no_grad():
        relu.b_enc.add_(torch.linspace(0, 0.5, 64))
        gated.b_gate.add_(torch.linspace(0, 0.5, 64))
        jumprelu.threshold.mul_(torch.linspace(0.5, 0.9, 64))
    for sae, name in ((relu, "b_enc"), (gated, "b_gate"), (jumprelu, "threshold")):
        before = {n: t.clone() for n, t in sae.state_dict().items()}
        sae.calibrate(x_ND)
        after = sae.state_dict()
        assert {n for n in before if not torch.equal(before[n], after[n])} == {name}
        moved_M = after[name] / before[name] if name == "threshold" else after[name] - before[name]
        torch.testing.assert_close(moved_M, moved_M[0].expand(64), rtol=1e-4, atol=1e-5)


@every_one
def test_a_dead_latent_fires_again_and_no_other_threshold_moves(name):
    sae, x_ND = make_sae(name), sparse_rows(500, seed=3)
    thresholds = sae.threshold if name == "jumprelu" else sae.b_enc.detach()
    thresholds[[2, 9]] *= 30
    terms = sae.loss(Batch(x_ND))
    assert not torch.isin(terms.codes.coo()[1], torch.tensor([2, 9])).any()
    sae.dead_after, before_M = 1000, thresholds.clone()
    for _ in range(400):
        terms = sae.loss(Batch(x_ND))
        sae.after_step(Batch(x_ND), terms)
    others = torch.ones(64, dtype=torch.bool)
    others[[2, 9]] = False
    assert len(sae.dead_latents()) == 0
    alive = others & (sae.encode(x_ND).to_dense() > 0).any(0)
    moved_M = (thresholds / before_M)[alive]  # A JumpReLU's move together, while L0 is not k.
    torch.testing.assert_close(moved_M, moved_M[0].expand_as(moved_M), rtol=1e-4, atol=0)
    assert name == "jumprelu" or (moved_M == 1).all()


@every_one
def test_revival_can_be_switched_off(name):
    sae = make_sae(name, revival=0.0)
    sae.tokens_since_fired.fill_(sae.dead_after)
    before = {n: t.clone() for n, t in sae.state_dict().items() if n in sae.weight_names}
    tell(sae, sae.k, times=5)
    assert all(torch.equal(sae.state_dict()[n], t) for n, t in before.items())
    with pytest.raises(UserError, match="revival is"):
        type(sae.spec)(revival=-0.1)


@every_one
def test_a_low_precision_scan_trains_on_the_same_codes_as_inference_reads(name):
    """Scans in bfloat16 propose; what is compared with a threshold is float32 in both."""
    sae, x_ND = make_sae(name), sparse_rows(300, seed=3)
    exact_NM = sae.encode(x_ND).to_dense()
    sae.compute_dtype = torch.bfloat16
    assert torch.equal(sae.loss(Batch(x_ND)).codes.to_dense(), sae.encode(x_ND).to_dense())
    torch.testing.assert_close(sae.encode(x_ND).to_dense(), exact_NM, rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
def test_gathering_latents_has_the_gradient_of_indexing(n, k, d_sae, seed):
    generator = torch.Generator().manual_seed(seed)
    indices_NK = torch.randint(0, d_sae, (n, k), generator=generator)
    codes = SparseCodes.from_topk(torch.ones(n, k), indices_NK, d_sae=d_sae)
    parameter_M = torch.randn(d_sae, generator=generator, requires_grad=True)
    weights_S = torch.randn(n * k, generator=generator)
    gathered_S = gather_latents(parameter_M, codes.entries)
    assert torch.equal(gathered_S, parameter_M[indices_NK.flatten()])
    (got_M,) = torch.autograd.grad((gathered_S * weights_S).sum(), parameter_M)
    (expected_M,) = torch.autograd.grad((parameter_M[indices_NK.flatten()] * weights_S).sum(), parameter_M)
    torch.testing.assert_close(got_M, expected_M, rtol=1e-4, atol=1e-5)
