"""Gated: the dense definition, gradients against finite differences, and where they are cut."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.saes.base import Batch
from saebench.saes.gated import GatedSAE, GatedSpec


def rows(n, d_in=12, seed=1):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


def make_sae(d_in=12, d_sae=40, k=5, seed=0, **options):
    sae = GatedSAE(GatedSpec(d_sae=d_sae, k=k, **options), d_in)
    sae.initialize(Batch(rows(200, d_in, seed)), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight, size in ((sae.b_gate, 0.2), (sae.b_mag, 0.5), (sae.r_mag, 0.3)):
            weight.add_(size * torch.randn(d_sae, generator=generator))
    return sae


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 16), st.integers(1, 60), st.data())
def test_encode_and_the_loss_equal_the_dense_definition(n, d_in, d_sae, data):
    sae, x_ND = make_sae(d_in, d_sae, data.draw(st.integers(1, d_sae))), rows(n, d_in)
    gate_NM = (x_ND - sae.b_dec) @ sae.W_enc + sae.b_gate
    W_mag_MD = sae.r_mag.exp()[:, None] * sae.W_enc_MD
    z_NM = (gate_NM > 0) * ((x_ND - sae.b_dec) @ W_mag_MD.T + sae.b_mag).relu()
    torch.testing.assert_close(sae.encode(x_ND).to_dense(), z_NM, rtol=1e-4, atol=1e-4)
    x_hat_ND = z_NM @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(sae(x_ND), x_hat_ND, rtol=1e-4, atol=1e-4)
    terms = sae.loss(Batch(x_ND))
    assert torch.equal(terms.codes.to_dense(), sae.encode(x_ND).to_dense())
    of_gate = (x_ND - gate_NM.relu() @ sae.W_dec - sae.b_dec).square().mean()
    total = (x_ND - x_hat_ND).square().mean() + of_gate + sae.coefficient() * gate_NM.relu().sum(1).mean()
    torch.testing.assert_close(terms.total, total, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms.extra["gate_reconstruction"], of_gate, rtol=1e-4, atol=1e-4)


def test_gradients_equal_finite_differences_with_gates_and_the_frozen_decoder_held_fixed():
    x_ND, sae = rows(7).double(), make_sae()
    names = ("W_enc_MD", "b_gate", "b_mag", "r_mag", "b_dec", "W_dec")
    weights = [getattr(sae, name).detach().double().requires_grad_() for name in names]
    frozen_W_dec_MD, frozen_b_dec_D = sae.W_dec.detach().double(), sae.b_dec.detach().double()
    coefficient = sae.coefficient().double()
    with torch.no_grad():
        open_NM = (x_ND - frozen_b_dec_D) @ sae.W_enc.double() + sae.b_gate.double() > 0

    def dense_loss(W_enc_MD, b_gate_M, b_mag_M, r_mag_M, b_dec_D, W_dec_MD):
        dots_NM = (x_ND - b_dec_D) @ W_enc_MD.T
        z_NM = open_NM * (r_mag_M.exp() * dots_NM + b_mag_M).relu()
        gate_NM = (dots_NM + b_gate_M).relu()
        reconstruction = (x_ND - z_NM @ W_dec_MD - b_dec_D).square().mean()
        of_gate = (x_ND - gate_NM @ frozen_W_dec_MD - frozen_b_dec_D).square().mean()
        return reconstruction + of_gate + coefficient * gate_NM.sum(1).mean()

    assert torch.autograd.gradcheck(dense_loss, weights, eps=1e-6, atol=1e-7)
    expected = torch.autograd.grad(dense_loss(*weights), weights)
    total = sae.loss(Batch(x_ND.float())).total
    got = torch.autograd.grad(total, [getattr(sae, name) for name in names])
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference.float(), rtol=1e-4, atol=1e-5)


def test_the_gates_loss_reaches_no_decoder_and_the_reconstruction_no_gate_bias():
    sae, x_ND = make_sae(), rows(30)
    names = ("W_enc_MD", "b_gate", "b_mag", "r_mag", "W_dec")
    terms = sae.loss(Batch(x_ND))
    of_all = torch.autograd.grad(terms.total, [getattr(sae, name) for name in names])
    alone = (x_ND - sae(x_ND)).square().mean()
    of_reconstruction = torch.autograd.grad(alone, [getattr(sae, n) for n in names], allow_unused=True)
    by_name = dict(zip(names, zip(of_all, of_reconstruction, strict=True), strict=True))
    for name in ("b_mag", "r_mag", "W_dec"):
        torch.testing.assert_close(*by_name[name], rtol=1e-5, atol=1e-8)
    assert by_name["b_gate"][1] is None and by_name["b_gate"][0].any()
    assert not torch.allclose(*by_name["W_enc_MD"])


def test_the_gates_bias_is_the_bias_of_the_encoder():
    sae = make_sae()
    assert sae.b_enc is sae.b_gate and "b_enc" not in sae.state_dict()
    before_M = sae.b_gate.clone()
    sae.fold_scale(2.0)
    torch.testing.assert_close(sae.b_gate, before_M / 2)


def test_closing_gates_changes_no_magnitude():
    sae, x_ND = make_sae(), rows(100)
    before_NM = sae.encode(x_ND).to_dense()
    with torch.no_grad():
        sae.raise_thresholds(torch.tensor(0.3))
    after_NM = sae.encode(x_ND).to_dense()
    assert (after_NM > 0).sum() < (before_NM > 0).sum()
    torch.testing.assert_close(after_NM[after_NM > 0], before_NM[after_NM > 0], rtol=1e-4, atol=1e-5)


def test_calibration_does_not_count_gates_that_open_on_nothing():
    sae, x_ND = make_sae(k=4), rows(500)
    with torch.no_grad():
        sae.b_mag.sub_(0.4)
    sae.calibrate(x_ND)
    assert abs(sae.encode(x_ND).l0().double().mean() - 4) <= 2 / 500
    assert (sae.open_gates(x_ND).values > 0).sum() > 4.2 * 500
