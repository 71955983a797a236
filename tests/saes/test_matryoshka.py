"""Matryoshka: each prefix of the dictionary reconstructs alone, and trains its own latents only."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.core.errors import UserError
from saebench.saes.base import Batch
from saebench.saes.matryoshka import MatryoshkaSAE, MatryoshkaSpec
from saebench.saes.mutual_choice import MutualChoiceSAE, MutualChoiceSpec


def make_sae(d_in=12, d_sae=40, k=5, seed=0, **options):
    sae = MatryoshkaSAE(MatryoshkaSpec(d_sae=d_sae, k=k, **options), d_in)
    sae.initialize(Batch(rows(200, d_in)), seed=seed)
    return sae


def rows(n, d_in=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d_in, generator=generator) * torch.rand(n, 1, generator=generator).mul(2)


def test_one_prefix_is_mutual_choice_to_the_bit():
    ours, theirs = make_sae(prefixes=(1.0,)), MutualChoiceSAE(MutualChoiceSpec(d_sae=40, k=5), 12)
    theirs.load_state_dict(ours.state_dict())
    for sae in (ours, theirs):
        sae.tokens_since_fired[::3] = sae.dead_after
    batch = Batch(rows(50))
    mine, reference = ours.loss(batch), theirs.loss(batch)
    for name in ("total", "reconstruction", "auxiliary", "error"):
        assert torch.equal(getattr(mine, name), getattr(reference, name)), name
    mine.total.backward()
    reference.total.backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 40), st.lists(st.integers(1, 63), max_size=5, unique=True))
def test_prefixes_decode_what_the_dense_dictionary_cut_off_decodes(n, d_sae, sixtyfourths):
    shares = (*(s / 64 for s in sorted(sixtyfourths)), 1.0)
    sae, x_ND = make_sae(8, d_sae, min(3, d_sae), prefixes=shares), rows(n, 8)
    codes = sae.choose(Batch(x_ND))
    x_hat_GND, dense_NM = sae.decode_prefixes(codes), codes.to_dense()
    assert len(x_hat_GND) == len(sae.spec.sizes) and sae.spec.sizes[-1] == d_sae
    for size, x_hat_ND in zip(sae.spec.sizes, x_hat_GND, strict=True):
        expected_ND = dense_NM[:, :size] @ sae.W_dec[:size] + sae.b_dec
        torch.testing.assert_close(x_hat_ND, expected_ND, rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_mean_over_the_prefixes_and_the_report_is_of_the_whole():
    sae, x_ND = make_sae(prefixes=(0.25, 0.5, 1.0)), rows(30)
    terms = sae.loss(Batch(x_ND))
    of_prefix = (x_ND - sae.decode_prefixes(sae.choose(Batch(x_ND)))).square().mean((1, 2))
    torch.testing.assert_close(terms.total, of_prefix.mean())
    torch.testing.assert_close(terms.reconstruction, of_prefix[-1])
    torch.testing.assert_close(x_ND - terms.error, sae.decode(terms.codes))
    assert of_prefix[0] > of_prefix[-1]


def test_a_prefix_teaches_no_latent_outside_it():
    sae, x_ND = make_sae(prefixes=(0.25, 0.5, 1.0)), rows(50)
    codes = sae.attach_gradients(x_ND, sae.choose(Batch(x_ND)))
    x_hat_GND = sae.decode_prefixes(codes)
    for size, x_hat_ND in zip((10, 20, 40), x_hat_GND, strict=True):
        sae.zero_grad()
        (x_ND - x_hat_ND).square().mean().backward(retain_graph=True)
        for name in ("W_enc_MD", "b_enc", "W_dec"):
            of_latent = getattr(sae, name).grad.view(40, -1).abs().sum(1)
            assert (of_latent[size:] == 0).all() and (of_latent[:size] > 0).any()


def test_gradients_equal_finite_differences_with_the_selection_fixed():
    """A dense float64 loss passes central differences; the sparse functions give its gradients."""
    x_ND, sae = rows(7).double(), make_sae(prefixes=(0.2, 0.5, 1.0))
    names = ("W_enc_MD", "b_enc", "b_dec", "W_dec")
    weights = [getattr(sae, name).detach().double().requires_grad_() for name in names]
    kept_NM = sae.choose(Batch(x_ND.float())).to_dense() > 0

    def dense_loss(W_enc_MD, b_enc_M, b_dec_D, W_dec_MD):
        z_NM = kept_NM * ((x_ND - b_dec_D) @ W_enc_MD.T + b_enc_M)
        prefixes = [(x_ND - z_NM[:, :m] @ W_dec_MD[:m] - b_dec_D).square().mean() for m in (8, 20, 40)]
        return sum(prefixes) / 3

    assert torch.autograd.gradcheck(dense_loss, weights, eps=1e-6, atol=1e-7)
    expected = torch.autograd.grad(dense_loss(*weights), weights)
    got = torch.autograd.grad(sae.loss(Batch(x_ND.float())).total, [getattr(sae, name) for name in names])
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference.float(), rtol=1e-4, atol=1e-5)


def test_sizes_are_shares_of_the_dictionary():
    assert MatryoshkaSpec(d_sae=4096).sizes == [256, 512, 1024, 2048, 4096]
    assert MatryoshkaSpec(d_sae=3, k=1).sizes == [1, 2, 3]


@pytest.mark.parametrize(
    "prefixes", [(), (0.5,), (0.5, 0.25, 1.0), (0.0, 1.0), (0.5, 0.5, 1.0), (float("nan"), 1.0)]
)
def test_prefixes_that_do_not_nest_are_refused(prefixes):
    with pytest.raises(UserError, match=r"prefixes is .*shares of d_sae that ascend to 1"):
        MatryoshkaSpec(prefixes=prefixes)
