"""Transcoders and crosscoders: what every architecture that allows them does, against plain formulas."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from saebench.core.errors import UserError
from saebench.runs.run import load
from saebench.saes.base import Batch
from saebench.saes.registry import ARCHITECTURES, architecture
from saebench.saes.scales import Scaler, Scales
from saebench.saes.spec import SiteWidth

D_IN, D_OUT, D_SAE, K = 12, 7, 40, 5
SITES, TARGETS = (SiteWidth("in", D_IN),), (SiteWidth("a", 4), SiteWidth("b", 3))
PARTS = (SiteWidth("a", 5), SiteWidth("b", 7))
allowed = pytest.mark.parametrize("name", [n for n in ARCHITECTURES if not architecture(n).tied])


def rows(n, seed=1, d_out=D_OUT):
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(n, D_IN, generator=generator) + 0.5
    W_DE = torch.randn(D_IN, d_out, generator=torch.Generator().manual_seed(0))
    target_NE = (x_ND @ W_DE).relu() + 3
    return Batch(x_ND, torch.randn(n, d_out, generator=generator), target_NE=target_NE)


def make_transcoder(name, *, skip=False, **settings):
    spec = architecture(name).Spec(d_sae=D_SAE, k=K, sites=SITES, targets=TARGETS, skip=skip, **settings)
    sae = architecture(name)(spec, D_IN)
    sae.initialize(rows(300), seed=0)
    return sae


def a_few_steps(sae, *, lr=0.02, n_steps=8):
    from saebench.training.optimizer import make_optimizer, optimizer_step

    optimizer = make_optimizer(sae)
    for step in range(n_steps):
        batch = dataclasses.replace(rows(64, seed=step), progress=step / n_steps)
        terms = sae.loss(batch)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer_step(sae, optimizer, lr=lr, grad_clip=1.0)
        sae.after_step(batch, terms)
    sae.calibrate(rows(200, seed=50).x_ND)
    return sae


@allowed
@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_writes_its_target_from_its_input(name, skip):
    sae, x = make_transcoder(name, skip=skip), rows(6, seed=3).x_ND
    before = sae.loss(rows(64, seed=9)).reconstruction
    a_few_steps(sae)
    assert sae.loss(rows(64, seed=9)).reconstruction < before
    codes = sae.encode(x.view(2, 3, D_IN))
    by_hand = codes.to_dense() @ sae.W_dec + sae.b_dec
    if skip:
        assert sae.W_skip.abs().max() > 0
        by_hand = by_hand + (x.view(2, 3, D_IN) - sae.b_in) @ sae.W_skip.T
        with pytest.raises(ValueError, match=r"decode\(codes, x\)"):
            sae.decode(codes)
    torch.testing.assert_close(sae(x.view(2, 3, D_IN)), by_hand, rtol=1e-4, atol=1e-4)
    assert {name: part.shape for name, part in sae.split(sae(x), of=sae.spec.targets).items()} == {
        "a": (6, 4),
        "b": (6, 3),
    }


@allowed
@pytest.mark.parametrize("skip", [False, True])
def test_gradients_of_a_transcoder_are_those_of_its_formula(name, skip):
    """The decoder, its bias and the skip connection against autograd on the codes of the batch; the encoder
    against finite differences along its own gradient, where no selection changes."""
    sae = a_few_steps(make_transcoder(name, skip=skip, aux_coefficient=0.0))
    batch = dataclasses.replace(rows(64, seed=77), progress=0.9)
    sae.zero_grad()
    terms = sae.loss(batch)
    terms.total.backward()
    if name not in ("matryoshka", "gated", "relu", "jumprelu"):  # their objectives have further terms
        z = terms.codes.to_dense().detach()
        leaves = [p.detach().clone().requires_grad_() for p in (sae.W_dec, sae.b_dec)]
        y_hat = z @ leaves[0] + leaves[1]
        if skip:
            leaves.append(sae.W_skip.detach().clone().requires_grad_())
            y_hat = y_hat + (batch.x_ND - sae.b_in) @ leaves[2].T
        objective = (batch.target_NE - y_hat).square().mean()
        assert float(terms.reconstruction) == pytest.approx(objective.item(), rel=1e-4)
        objective.backward()
        own = [sae.W_dec.grad, sae.b_dec.grad, *([sae.W_skip.grad] if skip else [])]
        for mine, leaf in zip(own, leaves, strict=True):
            torch.testing.assert_close(mine, leaf.grad, rtol=1e-3, atol=1e-6)
    # The reconstruction by the gate holds the skip connection fixed, as it does the decoder.
    for parameter in (sae.W_enc_MD, *([sae.W_skip] if skip and name != "gated" else [])):
        slope = parameter.grad.double().norm()
        assert slope > 0
        direction = parameter.grad / slope.float()
        values, same = [], True
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                parameter.add_(step * direction)
                moved = sae.loss(batch)
                values.append(float(moved.total.double()))
                same &= torch.equal(moved.codes.to_dense() != 0, terms.codes.to_dense() != 0)
                parameter.sub_(step * direction)
        if same and name not in (
            "jumprelu",
        ):  # pseudo-derivatives move thresholds, and so values of the loss
            assert (values[0] - values[1]) / 2e-3 == pytest.approx(float(slope), rel=0.05)


@allowed
@pytest.mark.parametrize("skip", [False, True])
def test_folded_scales_encode_and_write_unscaled_activations(name, skip):
    batch = rows(300)
    scales = Scales((0.3,), (2.0, 0.7))
    sae = make_transcoder(name, skip=skip)
    scaler = Scaler(scales, sae.spec, torch.device("cpu"))
    sae.initialize(scaler.batch(batch), seed=0)
    sae.calibrate(scaler.sites(batch.x_ND))
    if skip:
        torch.nn.init.normal_(sae.W_skip)
    scaled = scaler.batch(batch)
    codes, y_hat = sae.encode(scaled.x_ND).to_dense(), sae(scaled.x_ND)
    sae.fold_scales(scales.sites, scales.targets)
    torch.testing.assert_close(sae.encode(batch.x_ND).to_dense(), codes / 2.0, rtol=1e-4, atol=1e-5)
    unscaled = y_hat / torch.tensor([2.0] * 4 + [0.7] * 3)
    torch.testing.assert_close(sae(batch.x_ND), unscaled, rtol=1e-4, atol=1e-4)


@allowed
def test_a_crosscoder_is_an_sae_of_its_sites_side_by_side(name):
    """To the bit where the scales are equal; with two scales, both parts are those of the scaled rows."""
    spec = architecture(name).Spec(d_sae=D_SAE, k=K)
    batch = dataclasses.replace(rows(300, d_out=D_IN), target_NE=None)
    saes = [
        architecture(name)(made, D_IN)
        for made in (spec, dataclasses.replace(spec, sites=PARTS, targets=PARTS))
    ]
    for sae in saes:
        sae.initialize(batch, seed=0)
    alone, joined = ({n: getattr(sae, n) for n in sae.weight_names} for sae in saes)
    assert alone.keys() == joined.keys()
    assert all(torch.equal(alone[n], joined[n]) for n in alone)
    sae, scales = saes[1], Scales((0.5, 3.0))
    scaler = Scaler(scales, sae.spec, torch.device("cpu"))
    sae.initialize(scaler.batch(batch), seed=0)
    sae.calibrate(scaler.sites(batch.x_ND))
    batch = rows(299, seed=8, d_out=D_IN)  # of the rows of the calibration, one lies exactly on the threshold
    codes, x_hat = sae.encode(scaler.sites(batch.x_ND)).to_dense(), sae(scaler.sites(batch.x_ND))
    sae.fold_scales(scales.sites, scales.targets)
    # The encoder no longer subtracts what the decoder adds in one unit, but in the units of each site.
    torch.testing.assert_close(sae.encode(batch.x_ND).to_dense(), codes / 0.5, rtol=1e-4, atol=1e-5)
    parts, scaled = sae.split(sae(batch.x_ND)), sae.split(x_hat)
    torch.testing.assert_close(parts["a"], scaled["a"] / 0.5, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts["b"], scaled["b"] / 3.0, rtol=1e-4, atol=1e-4)


@allowed
def test_a_transcoder_is_saved_and_loaded(name, tmp_path):
    sae = make_transcoder(name, skip=True)
    torch.nn.init.normal_(sae.W_skip)
    sae.save(tmp_path, hook_name="in", model=None)
    again, x_ND = load(tmp_path), rows(9).x_ND
    assert again.spec == sae.spec and again.d_out == D_OUT
    assert torch.equal(again(x_ND), sae(x_ND))


def test_a_tied_dictionary_is_refused():
    with pytest.raises(UserError, match="one dictionary that is encoder and decoder"):
        make_transcoder("matching-pursuit")


def test_gradient_selection_uses_the_gradient_at_the_target():
    sae = make_transcoder("gradient", beta=100.0)
    batch = rows(50, seed=4)
    one = sae.encode(batch.x_ND, inference="oracle", gradient=batch.gradient_ND)
    pre_NM = ((batch.x_ND - sae.b_in) @ sae.W_enc_MD.T + sae.b_enc).relu()
    score_NM = pre_NM * (1 + sae.weight * (batch.gradient_ND @ sae.W_dec.T).abs())
    expected_NK = score_NM.topk(K, dim=1).indices.sort(1).values
    assert torch.equal(one.rectangular()[0].long().sort(1).values, expected_NK)
    with pytest.raises(ValueError, match="must be 7 wide"):
        sae.encode(batch.x_ND, inference="oracle", gradient=batch.x_ND)
