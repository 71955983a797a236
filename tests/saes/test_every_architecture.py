"""Properties of every registered architecture; capability flags of the class say which apply."""

from __future__ import annotations

import pytest
import torch

from saebench.core.errors import UserError
from saebench.runs.run import load
from saebench.saes.base import Batch
from saebench.saes.registry import ARCHITECTURES, architecture

D_IN, D_SAE, K = 12, 40, 5
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def those_with(flag):
    """The architectures whose class sets a capability flag."""
    return pytest.mark.parametrize("name", [n for n in ARCHITECTURES if getattr(architecture(n), flag)])


every_device = pytest.mark.parametrize("device", DEVICES)


def rows(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(n, D_IN, generator=generator) + 0.5, torch.randn(n, D_IN, generator=generator))


def on(batch, device):
    return Batch(batch.x_ND.to(device), batch.gradient_ND.to(device), batch.progress)


def make_sae(name, device="cpu", **settings):
    sae = architecture(name)(architecture(name).Spec(d_sae=D_SAE, k=K, **settings), D_IN).to(device)
    sae.initialize(on(rows(300), device), seed=0)
    return sae


def a_few_steps(sae, device="cpu"):
    """Far enough from the start that nothing is as it was initialized."""
    from saebench.training.optimizer import make_optimizer, optimizer_step

    optimizer = make_optimizer(sae)
    for step in range(8):
        batch = on(rows(64, seed=step), device)
        batch = Batch(batch.x_ND, batch.gradient_ND, step / 8)
        terms = sae.loss(batch)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer_step(sae, optimizer, lr=0.02, grad_clip=1.0)
        sae.after_step(batch, terms)
    sae.calibrate(on(rows(200, seed=50), device).x_ND)
    return sae


@every_device
@every_architecture
def test_codes_have_the_shape_of_the_input_and_decode_to_the_reconstruction(name, device):
    sae, x = a_few_steps(make_sae(name, device), device), rows(6, seed=3).x_ND.to(device)
    assert sae.encode(x.view(2, 3, D_IN)).to_dense().shape == (2, 3, D_SAE)
    assert sae.encode(x[0]).to_dense().shape == (D_SAE,)
    assert sae(x[0]).shape == (D_IN,)
    assert sae.encode(x[:0]).to_dense().shape == (0, D_SAE) and sae(x[:0]).shape == (0, D_IN)
    torch.testing.assert_close(sae(x.view(2, 3, D_IN))[1, 2], sae(x[5]), rtol=1e-4, atol=1e-5)
    dense = sae.encode(x).to_dense()
    torch.testing.assert_close(sae(x), dense @ sae.W_dec + sae.b_dec, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="must be 12 wide"):
        sae.encode(torch.zeros(3, 11, device=device))


@every_device
@every_architecture
def test_loss_falls_in_a_few_steps(name, device):
    sae = make_sae(name, device)
    before = sae.loss(on(rows(64, seed=9), device)).reconstruction
    a_few_steps(sae, device)
    assert sae.loss(on(rows(64, seed=9), device)).reconstruction < before


@every_device
@those_with("unit_norm_decoder")
def test_decoder_rows_keep_unit_norm(name, device):
    norms = a_few_steps(make_sae(name, device), device).W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-5)


@every_architecture
def test_saved_and_loaded_it_gives_the_same_codes(name, tmp_path):
    sae = a_few_steps(make_sae(name))
    sae.save(tmp_path / "sae")
    again, x_ND = load(tmp_path / "sae"), rows(20, seed=4).x_ND
    assert again.spec == sae.spec
    assert torch.equal(again.encode(x_ND).to_dense(), sae.encode(x_ND).to_dense())
    assert torch.equal(again(x_ND), sae(x_ND))
    (tmp_path / "sae" / "sae.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path / "sae")


@those_with("homogeneous")
def test_folding_the_scale_gives_the_sae_of_the_unscaled_rows(name):
    """z(s x) = s z'(x), and so with the reconstructions."""
    sae, x_ND, scale = a_few_steps(make_sae(name)), rows(30, seed=5).x_ND, 3.7
    codes, x_hat_ND = sae.encode(x_ND).to_dense(), sae(x_ND)
    sae.fold_scale(scale)
    torch.testing.assert_close(scale * sae.encode(x_ND / scale).to_dense(), codes, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scale * sae(x_ND / scale), x_hat_ND, rtol=1e-4, atol=1e-4)


@those_with("permutable_latents")
def test_permuting_the_latents_permutes_the_code(name):
    sae, other = a_few_steps(make_sae(name)), make_sae(name)
    order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(2))
    state = sae.state_dict()
    other.load_state_dict({n: t[order] if t.ndim and t.shape[0] == D_SAE else t for n, t in state.items()})
    x_ND = rows(20, seed=6).x_ND
    torch.testing.assert_close(other.encode(x_ND).to_dense(), sae.encode(x_ND).to_dense()[:, order])
    torch.testing.assert_close(other(x_ND), sae(x_ND), rtol=1e-4, atol=1e-5)


@every_device
@every_architecture
def test_loss_and_gradients_repeat_bit_for_bit_and_change_no_state(name, device):
    sae, batch = a_few_steps(make_sae(name, device), device), on(rows(64, seed=7), device)

    def once():
        sae.zero_grad()
        terms = sae.loss(batch)
        terms.total.backward()
        return [terms.total.detach(), terms.error, *(p.grad.clone() for p in sae.parameters())]

    before = {n: t.clone() for n, t in sae.state_dict().items()}
    first, second = once(), once()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(t, before[n]) for n, t in sae.state_dict().items())


@every_device
@every_architecture
def test_low_precision_scan_changes_the_reconstruction_little(name, device):
    sae, x_ND = a_few_steps(make_sae(name, device), device), rows(64, seed=8).x_ND.to(device)
    exact = sae(x_ND)
    sae.compute_dtype = torch.bfloat16
    assert sae.encode(x_ND).values.dtype == torch.float32
    assert (sae(x_ND) - exact).norm() < 0.15 * exact.norm()


@every_architecture
def test_dead_latents_get_a_gradient_from_the_auxiliary_loss_and_none_without(name):
    for coefficient in (1 / 32, 0.0):
        sae = a_few_steps(make_sae(name, aux_coefficient=coefficient))
        batch = rows(64, seed=9)
        sae.tokens_since_fired.fill_(sae.dead_after)
        terms = sae.loss(Batch(batch.x_ND, batch.gradient_ND, 0.9))
        assert (terms.auxiliary > 0) == (coefficient > 0)
        if coefficient:
            sae.zero_grad()
            (terms.total - terms.reconstruction).backward()
            assert (sae.W_enc_MD if sae.tied else sae.W_dec).grad.any()


@every_architecture
def test_k_below_1_or_above_d_sae_is_refused(name):
    for k in (0, D_SAE + 1):
        with pytest.raises(UserError, match="k is"):
            architecture(name).Spec(d_sae=D_SAE, k=k).check(batch_size=4096, n_steps=99)
