"""JumpReLU: the dense definition, and every gradient against its stated formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.core.errors import UserError
from saebench.saes.base import Batch
from saebench.saes.jumprelu import THRESHOLD_RATE, JumpReluSAE, JumpReluSpec
from saebench_kernels import jump_relu


def rows(n, d_in=12, seed=1):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


def make_sae(d_in=12, d_sae=40, k=5, seed=0, **options):
    sae = JumpReluSAE(JumpReluSpec(d_sae=d_sae, k=k, **options), d_in)
    sae.initialize(Batch(rows(200, d_in, seed)), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.b_enc.add_(0.1 * torch.randn(d_sae, generator=generator))
        sae.threshold.mul_(torch.exp(0.3 * torch.randn(d_sae, generator=generator)))
    return sae


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 16), st.integers(1, 60), st.floats(0.01, 2), st.data())
def test_encode_and_the_loss_equal_the_dense_definition(n, d_in, d_sae, bandwidth, data):
    sae = make_sae(d_in, d_sae, data.draw(st.integers(1, d_sae)), bandwidth=bandwidth)
    x_ND = rows(n, d_in)
    pre_NM = (x_ND - sae.b_dec) @ sae.W_enc + sae.b_enc
    z_NM = pre_NM.relu() * (pre_NM > sae.threshold)
    torch.testing.assert_close(sae.encode(x_ND).to_dense(), z_NM, rtol=1e-4, atol=1e-4)
    x_hat_ND = z_NM @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(sae(x_ND), x_hat_ND, rtol=1e-4, atol=1e-4)
    terms = sae.loss(Batch(x_ND))
    assert torch.equal(terms.codes.to_dense(), sae.encode(x_ND).to_dense())
    l0 = (z_NM > 0).sum(1).float().mean()
    torch.testing.assert_close(
        terms.total, (x_ND - x_hat_ND).square().mean() + sae.coefficient() * l0, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("bandwidth", [0.3, 1.0, 2.0])
def test_threshold_gradients_are_the_papers_kernel_formula(bandwidth):
    """Summed over the batch in float64, from the dense gradient of the reconstruction with respect to z."""
    sae, x_ND = make_sae(bandwidth=bandwidth), rows(60)
    with torch.no_grad():
        W_dec, b_dec, theta_M = sae.W_dec.double(), sae.b_dec.double(), sae.threshold.double()
        pre_NM = (x_ND.double() - b_dec) @ sae.W_enc.double() + sae.b_enc.double()
        z_NM = pre_NM * (pre_NM > theta_M)
        d_z_NM = 2 * (z_NM @ W_dec + b_dec - x_ND.double()) @ W_dec.T / x_ND.numel()
        eps_M = bandwidth * theta_M
        K_NM = (((pre_NM - theta_M) / eps_M).abs() < 0.5).double() * (pre_NM > 0)
        by_z_M = (-(theta_M / eps_M) * K_NM * d_z_NM).sum(0)
        by_l0_M = (-(1 / eps_M) * K_NM).sum(0) * sae.coefficient().double() / len(x_ND)
    assert K_NM.sum() > 50 and by_z_M.norm() > 0.01 * by_l0_M.norm() > 0
    sae.loss(Batch(x_ND)).total.backward()
    expected_M = theta_M * (by_z_M + by_l0_M)  # of the logarithm
    torch.testing.assert_close(sae.log_step.grad.double(), expected_M, rtol=1e-4, atol=1e-7)


def test_jump_relu_and_its_gradients_equal_a_calculation_by_hand():
    """theta = 2, bandwidth 0.5: the window is (1.5, 2.5)."""
    pre_S = torch.tensor([1.4, 1.6, 2.0, 2.4, 2.6], requires_grad=True)
    threshold_S = torch.full((5,), 2.0, requires_grad=True)
    z_S, active_S = jump_relu(pre_S, threshold_S, 0.5)
    torch.testing.assert_close(z_S, torch.tensor([0.0, 0.0, 0.0, 2.4, 2.6]))
    assert active_S.tolist() == [0, 0, 0, 1, 1]
    (3 * z_S + 5 * active_S).sum().backward()
    assert pre_S.grad.tolist() == [0, 0, 0, 3, 3]
    assert threshold_S.grad.tolist() == [0, -11, -11, -11, 0]  # -(2 / 1) 3 - (1 / 1) 5


def test_all_other_gradients_equal_finite_differences_with_the_active_entries_fixed():
    x_ND, sae = rows(7).double(), make_sae()
    names = ("W_enc_MD", "b_enc", "b_dec", "W_dec")
    weights = [getattr(sae, name).detach().double().requires_grad_() for name in names]
    active_NM = sae.encode(x_ND).to_dense().double() > 0

    def dense_loss(W_enc_MD, b_enc_M, b_dec_D, W_dec_MD):
        z_NM = ((x_ND - b_dec_D) @ W_enc_MD.T + b_enc_M) * active_NM
        return (x_ND - z_NM @ W_dec_MD - b_dec_D).square().mean()

    assert torch.autograd.gradcheck(dense_loss, weights, eps=1e-6, atol=1e-7)
    expected = torch.autograd.grad(dense_loss(*weights), weights)
    total = sae.loss(Batch(x_ND.float())).total
    got = torch.autograd.grad(total, [getattr(sae, name) for name in names])
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference.float(), rtol=1e-4, atol=1e-5)


def test_a_step_moves_the_threshold_and_leaves_no_step_behind():
    sae, batch = make_sae(), Batch(rows(50))
    terms, before_M = sae.loss(batch), sae.threshold.clone()
    with torch.no_grad():
        sae.log_step.copy_(torch.linspace(-0.02, 0.02, 40))
    sae.after_step(batch, terms)
    all_by = (terms.codes.l0().double().mean() / 5) ** sae.threshold_gain
    moved_M = all_by.float() * before_M * (THRESHOLD_RATE * torch.linspace(-0.02, 0.02, 40)).exp()
    assert abs(all_by - 1) > 1e-3
    torch.testing.assert_close(sae.threshold, moved_M)
    assert (sae.log_step == 0).all()


def test_thresholds_move_far_in_few_steps_in_any_unit_of_the_gradient():
    """An Adam step of the learning rate is a change of the threshold by ten times that share."""
    from saebench.training.optimizer import make_optimizer, optimizer_step

    for unit in (1.0, 1e-4):
        sae = make_sae()
        sae.log_multiplier.add_(6.0)  # A penalty far too large: all thresholds rise.
        optimizer, before_M = make_optimizer(sae), sae.threshold.clone()
        for step in range(20):
            batch = Batch(rows(256, seed=step))
            terms = sae.loss(batch)
            optimizer.zero_grad()
            (unit * terms.total).backward()
            optimizer_step(sae, optimizer, lr=1e-3, grad_clip=0.0)
            sae.after_step(batch, terms)
        rise_M = (sae.threshold / before_M).log()
        assert rise_M.median() > 0.1 and rise_M.max() < 20 * 10 * 1e-3 * 1.1


def test_impossible_bandwidths_are_refused():
    for bandwidth in (0.0, -1.0, 2.1, float("nan")):
        with pytest.raises(UserError, match="bandwidth"):
            JumpReluSpec(bandwidth=bandwidth)
