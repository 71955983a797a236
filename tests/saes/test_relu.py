"""ReLU with L1: the dense definition, and gradients against finite differences."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.saes.base import Batch
from saebench.saes.relu import ReluSAE, ReluSpec


def rows(n, d_in=12, seed=1):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


def make_sae(d_in=12, d_sae=40, k=5, seed=0, **options):
    sae = ReluSAE(ReluSpec(d_sae=d_sae, k=k, **options), d_in)
    sae.initialize(Batch(rows(200, d_in, seed)), seed=seed)
    with torch.no_grad():
        sae.b_enc.add_(0.1 * torch.randn(d_sae, generator=torch.Generator().manual_seed(seed)))
    return sae


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 16), st.integers(1, 60), st.data())
def test_encode_and_the_loss_equal_the_dense_definition(n, d_in, d_sae, data):
    sae, x_ND = make_sae(d_in, d_sae, data.draw(st.integers(1, d_sae))), rows(n, d_in)
    z_NM = ((x_ND - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    torch.testing.assert_close(sae.encode(x_ND).to_dense(), z_NM, rtol=1e-4, atol=1e-4)
    x_hat_ND = z_NM @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(sae(x_ND), x_hat_ND, rtol=1e-4, atol=1e-4)
    terms = sae.loss(Batch(x_ND))
    assert torch.equal(terms.codes.to_dense(), sae.encode(x_ND).to_dense())
    l1 = (z_NM * sae.W_dec.norm(dim=1)).sum(1).mean()
    total = (x_ND - x_hat_ND).square().mean() + sae.coefficient() * l1
    torch.testing.assert_close(terms.total, total, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms.extra["l0_coefficient"], sae.coefficient())


def test_gradients_equal_finite_differences():
    x_ND, sae = rows(7).double(), make_sae()
    names = ("W_enc_MD", "b_enc", "b_dec", "W_dec")
    weights = [getattr(sae, name).detach().double().requires_grad_() for name in names]
    coefficient = sae.coefficient().double()

    def dense_loss(W_enc_MD, b_enc_M, b_dec_D, W_dec_MD):
        z_NM = ((x_ND - b_dec_D) @ W_enc_MD.T + b_enc_M).relu()
        x_hat_ND = z_NM @ W_dec_MD + b_dec_D
        return (x_ND - x_hat_ND).square().mean() + coefficient * z_NM.sum(1).mean()

    assert torch.autograd.gradcheck(dense_loss, weights, eps=1e-6, atol=1e-7)
    expected = torch.autograd.grad(dense_loss(*weights), weights)
    total = sae.loss(Batch(x_ND.float())).total
    got = torch.autograd.grad(total, [getattr(sae, name) for name in names])
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference.float(), rtol=1e-4, atol=1e-5)


def test_the_penalty_at_the_start_is_the_one_for_which_soft_thresholding_is_best():
    """With orthonormal atoms that are also the encoder, no change of the codes lowers the loss."""
    sae = ReluSAE(ReluSpec(d_sae=12, k=3), 12)
    x_ND, threshold = rows(50), torch.tensor(0.4)
    with torch.no_grad():
        for weight in (sae.W_enc_MD, sae.W_dec):
            weight.copy_(torch.eye(12))
        sae.set_threshold(threshold)
        sae.log_multiplier.copy_(sae.log_coefficient_of(threshold))
    z_NM = sae.encode(x_ND).to_dense().requires_grad_()
    x_hat_ND = z_NM @ sae.W_dec
    loss = (x_ND - x_hat_ND).square().mean() + sae.coefficient() * z_NM.sum(1).mean()
    (gradient_NM,) = torch.autograd.grad(loss, z_NM)
    torch.testing.assert_close(gradient_NM[z_NM > 0], torch.zeros_like(z_NM[z_NM > 0]), rtol=0, atol=1e-7)
    assert (gradient_NM[z_NM == 0] > 0).all()
