"""TopK: exact properties of the code, gradients against finite differences, AuxK reaching the encoder."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.core.codes import SparseCodes
from saebench.core.errors import UserError
from saebench.runs.run import load
from saebench.saes.base import Batch
from saebench.saes.topk import TopKSAE, TopKSpec


def make_sae(d_in=12, d_sae=40, k=5, seed=0, **options):
    sae = TopKSAE(TopKSpec(d_sae=d_sae, k=k, **options), d_in)
    generator = torch.Generator().manual_seed(seed)
    sae.initialize(Batch(torch.randn(200, d_in, generator=generator)), seed=seed)
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * torch.randn(d_sae, generator=generator))
    return sae


def rows(n, d_in=12, seed=1):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 16), st.integers(1, 60), st.data())
def test_encode_equals_the_dense_definition(n, d_in, d_sae, data):
    k = data.draw(st.integers(1, d_sae))
    sae = make_sae(d_in, d_sae, k)
    x_ND = rows(n, d_in)
    pre_NM = (x_ND - sae.b_dec) @ sae.W_enc + sae.b_enc
    top = pre_NM.topk(k, dim=1)
    dense_NM = torch.zeros_like(pre_NM).scatter(1, top.indices, top.values.relu())
    codes = sae.encode(x_ND)
    torch.testing.assert_close(codes.to_dense(), dense_NM, rtol=1e-4, atol=1e-4)
    assert (codes.l0() <= k).all()
    assert torch.equal(codes.l0(), (pre_NM > 0).sum(1).clamp_max(k))
    torch.testing.assert_close(sae(x_ND), dense_NM @ sae.W_dec + sae.b_dec, rtol=1e-4, atol=1e-4)


def test_every_input_shape_gives_its_own_leading_shape():
    sae, x = make_sae(), rows(6).view(2, 3, 12)
    assert sae.encode(x).to_dense().shape == (2, 3, 40)
    assert sae.encode(x[0, 0]).to_dense().shape == (40,)
    assert sae(x).shape == (2, 3, 12) and sae(x[0, 0]).shape == (12,)
    torch.testing.assert_close(sae(x)[1, 2], sae(x[1, 2]))
    assert sae.encode(rows(0)).to_dense().shape == (0, 40)
    with pytest.raises(UserError, match="its last axis must be 12 wide"):
        sae.encode(torch.zeros(3, 11))


def test_permuting_latents_permutes_the_code():
    sae, x_ND = make_sae(), rows(20)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    other = make_sae()
    with torch.no_grad():
        for name in ("W_enc_MD", "W_dec", "b_enc"):
            getattr(other, name).copy_(getattr(sae, name)[order])
    torch.testing.assert_close(other.encode(x_ND).to_dense(), sae.encode(x_ND).to_dense()[:, order])
    torch.testing.assert_close(other(x_ND), sae(x_ND))


@pytest.mark.parametrize("multi_topk", [False, True])
def test_gradients_equal_finite_differences_with_the_selection_fixed(multi_topk):
    """A dense float64 loss passes central differences; the sparse functions give its gradients."""
    x_ND, sae = rows(7).double(), make_sae(multi_topk=multi_topk)
    names = ("W_enc_MD", "b_enc", "b_dec", "W_dec")
    weights = [getattr(sae, name).detach().double().requires_grad_() for name in names]
    pre_NM = (x_ND - sae.b_dec) @ sae.W_enc.double() + sae.b_enc
    kept = [pre_NM.detach().topk(k, dim=1).indices for k in (5, 20)]

    def dense_loss(W_enc_MD, b_enc_M, b_dec_D, W_dec_MD):
        def reconstruction(indices_NK):
            pre_NK = ((x_ND - b_dec_D) @ W_enc_MD.T + b_enc_M).gather(1, indices_NK).relu()
            x_hat_ND = torch.einsum("nk,nkd->nd", pre_NK, W_dec_MD[indices_NK]) + b_dec_D
            return (x_ND - x_hat_ND).square().mean()

        return reconstruction(kept[0]) + multi_topk * reconstruction(kept[1]) / 8

    assert torch.autograd.gradcheck(dense_loss, weights, eps=1e-6, atol=1e-7)
    expected = torch.autograd.grad(dense_loss(*weights), weights)
    terms = sae.loss(Batch(x_ND.float()))
    got = torch.autograd.grad(terms.total, [getattr(sae, name) for name in names])
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference.float(), rtol=1e-4, atol=1e-5)
    plain = make_sae().loss(Batch(x_ND.float()))
    torch.testing.assert_close(terms.codes.to_dense(), plain.codes.to_dense())
    torch.testing.assert_close(terms.reconstruction, plain.reconstruction)


def test_k_falls_from_k_start_and_stays():
    sae, x_ND = make_sae(k=3, k_start=11, k_anneal=0.5), rows(20)
    seen = [sae.k_at(progress) for progress in (0.0, 0.125, 0.25, 0.375, 0.499, 0.5, 0.9)]
    assert seen == [11, 9, 7, 5, 3, 3, 3]
    assert sae.loss(Batch(x_ND, progress=0.25)).codes.k == 7
    assert sae.encode(x_ND).k == 3
    for bad in ({"k_start": 2}, {"k_start": 41}, {"k_start": 11, "k_anneal": 1.5}, {"k_anneal": -1}):
        with pytest.raises(UserError, match=r"k_start|k_anneal"):
            TopKSpec(d_sae=40, k=3, **bad)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 99))
def test_another_k_at_inference_keeps_the_k_largest(k, seed):
    sae, x_ND = make_sae(seed=seed), rows(9, seed=seed)
    dense_NM, all_NM = sae.encode(x_ND, k=k).to_dense(), sae.encode(x_ND, k=40).to_dense()
    kept = dense_NM > 0
    torch.testing.assert_close(dense_NM[kept], all_NM[kept])
    assert torch.equal(kept.sum(1), (all_NM > 0).sum(1).clamp_max(k))
    assert ((dense_NM.min(1).values == 0) | (k == 40) | (all_NM > 0).all(1)).all()
    for n, few in enumerate(dense_NM):
        if kept[n].any() and (~kept[n]).any():
            assert all_NM[n][~kept[n]].max() <= few[kept[n]].min()
    with pytest.raises(ValueError, match="between 1 and d_sae = 40"):
        sae.encode(x_ND, k=41)


def test_a_latent_cut_by_the_relu_gets_no_gradient():
    sae = make_sae(k=40)
    terms = sae.loss(Batch(rows(1)))
    terms.total.backward()
    silent = terms.codes.to_dense()[0] == 0
    assert silent.any()
    assert (sae.W_enc_MD.grad[silent] == 0).all() and (sae.b_enc.grad[silent] == 0).all()


def test_aux_is_zero_without_dead_latents_and_uses_all_when_all_are_dead():
    sae, x_ND = make_sae(k_aux=40), rows(30)
    assert sae.loss(Batch(x_ND)).auxiliary == 0
    sae.tokens_since_fired.fill_(sae.dead_after)
    error_ND = (x_ND - sae(x_ND)).detach()
    pre_NM = ((x_ND - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    left = (error_ND - pre_NM @ sae.W_dec).square().sum() / (error_ND - error_ND.mean(0)).square().sum()
    torch.testing.assert_close(sae.loss(Batch(x_ND)).auxiliary, left)


def test_aux_gradient_reaches_dead_encoder_and_decoder_rows_only():
    sae, x_ND = make_sae(k_aux=3), rows(30)
    dead = torch.tensor([1, 7, 11, 30])
    sae.tokens_since_fired[dead] = sae.dead_after
    sae.auxiliary_loss(Batch(x_ND), (x_ND - sae(x_ND)).detach()).backward()
    touched = torch.zeros(40, dtype=torch.bool)
    touched[dead] = True
    assert (sae.W_enc_MD.grad[touched].norm(dim=1) > 0).any()
    for name in ("W_enc_MD", "W_dec"):
        assert (getattr(sae, name).grad[~touched] == 0).all()
    assert sae.b_dec.grad is None or (sae.b_dec.grad == 0).all()


def test_a_step_on_aux_alone_brings_the_dead_latents_closer_to_the_residual():
    """The sign is correct: |x - x_hat - e_hat|^2 falls (a port of this loss fits the negated residual)."""
    sae, x_ND = make_sae(k_aux=10), rows(200)
    sae.tokens_since_fired[10:30] = sae.dead_after
    error_ND = (x_ND - sae(x_ND)).detach()
    before = sae.auxiliary_loss(Batch(x_ND), error_ND)
    before.backward()
    with torch.no_grad():
        for parameter in (sae.W_enc_MD, sae.W_dec, sae.b_enc):
            parameter -= 0.05 * parameter.grad
    assert sae.auxiliary_loss(Batch(x_ND), error_ND) < before


def test_aux_of_a_residual_that_does_not_vary_is_zero_and_so_is_its_gradient():
    for n, error_ND in ((5, torch.zeros(5, 12)), (1, rows(1))):
        sae = make_sae()
        sae.tokens_since_fired.fill_(sae.dead_after)
        aux = sae.auxiliary_loss(Batch(rows(n)), error_ND)
        assert aux == 0
        aux.backward()
        assert (sae.W_enc_MD.grad == 0).all() and (sae.W_dec.grad == 0).all()


def test_firing_counters_and_the_dead_set():
    sae = make_sae()
    sae.dead_after = 100
    codes = sae.encode(rows(60))
    fired = codes.to_dense().any(0)
    sae.count_firing(codes)
    assert (sae.tokens_since_fired[fired] == 0).all() and (sae.tokens_since_fired[~fired] == 60).all()
    sae.count_firing(codes)
    assert torch.equal(sae.dead_latents(), (~fired).nonzero()[:, 0])


def test_padding_does_not_count_as_firing():
    sae = make_sae()
    values_NK, indices_NK = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3, 5], [5, 7]])
    sae.count_firing(SparseCodes.from_topk(values_NK, indices_NK, d_sae=40))
    assert sae.tokens_since_fired[[3, 5, 7]].tolist() == [0, 2, 0]


def test_initial_encoder_scale_is_the_best_one():
    sae, x_ND = TopKSAE(TopKSpec(d_sae=64, k=4), 16), rows(500, 16) + 3
    sae.initialize(Batch(x_ND), seed=0)
    best = (x_ND - sae(x_ND)).square().sum()
    for factor in (0.9, 1.1):
        other = TopKSAE(sae.spec, 16)
        other.load_state_dict(sae.state_dict())
        with torch.no_grad():
            other.W_enc_MD.mul_(factor)
        assert (x_ND - other(x_ND)).square().sum() > best


def test_folding_the_input_scale_changes_units_and_nothing_else():
    sae, x_ND = make_sae(), rows(25)
    scaled_hat_ND, dense_NM = sae(3.5 * x_ND) / 3.5, sae.encode(3.5 * x_ND).to_dense() / 3.5
    sae.fold_scale(3.5)
    torch.testing.assert_close(sae(x_ND), scaled_hat_ND, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.encode(x_ND).to_dense(), dense_NM, rtol=1e-5, atol=1e-5)


def test_save_and_load_give_the_same_bits(tmp_path):
    sae = make_sae(k_aux=7)
    sae.save(tmp_path / "sae", hook_name="blocks.0.hook_resid_post")
    again = load(tmp_path / "sae")
    assert again.spec == sae.spec and again.d_in == sae.d_in
    for name in sae.weight_names:
        assert torch.equal(getattr(again, name), getattr(sae, name))
    assert json.loads((tmp_path / "sae" / "sae.json").read_text())["hook_name"] == "blocks.0.hook_resid_post"


def test_damaged_folders_end_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="holds no SAE"):
        load(tmp_path)
    make_sae().save(tmp_path)
    weights = (tmp_path / "sae.safetensors").read_bytes()
    (tmp_path / "sae.safetensors").write_bytes(weights[:-10])
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path)
    (tmp_path / "sae.safetensors").unlink()
    with pytest.raises(UserError, match=r"sae\.safetensors does not exist"):
        load(tmp_path)
    make_sae(d_in=13).save(tmp_path / "other")
    (tmp_path / "sae.safetensors").write_bytes((tmp_path / "other" / "sae.safetensors").read_bytes())
    with pytest.raises(UserError, match="its SHA-256 is"):
        load(tmp_path)
    description = json.loads((tmp_path / "sae.json").read_text())
    del description["weights_sha256"]  # as earlier versions wrote it
    (tmp_path / "sae.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="W_dec has shape"):
        load(tmp_path)
    description = json.loads((tmp_path / "sae.json").read_text())
    (tmp_path / "sae.json").write_text(json.dumps(description | {"format_version": 99}))
    with pytest.raises(UserError, match="update saebench"):
        load(tmp_path)
    (tmp_path / "sae.safetensors").unlink()
    (tmp_path / "sae.safetensors").mkdir()
    (tmp_path / "sae.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"d_in": "x"}, "damaged: d_in is 'x'"),
        ({"d_in": None}, "damaged: d_in is None"),
        ({"d_in": -4}, "damaged: d_in is -4"),
        ({"d_in": 10**12}, r"W_dec has shape \(40, 12\) where \(40, 1000000000000\)"),
        ({"spec": {"d_sae": 10**12}}, r"W_dec has shape \(40, 12\)"),
        ({"spec": [1]}, r"damaged: spec is \[1\]"),
        ({"sae": ["topk"]}, r"damaged: sae is \['topk'\]"),
        ({"sae": "topkk"}, "'topkk' is not an SAE architecture"),
        ({"model": "demo"}, "damaged: model is 'demo'"),
        ({"hook_name": 7}, "damaged: hook_name is 7"),
    ],
)
def test_a_description_with_damaged_values_ends_in_a_sentence(tmp_path, damage, message):
    make_sae().save(tmp_path)
    description = json.loads((tmp_path / "sae.json").read_text())
    (tmp_path / "sae.json").write_text(json.dumps(description | damage))
    with pytest.raises(UserError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 50, "d_sae": 40}, "k is 50"),
        ({"aux_coefficient": -1}, "aux_coefficient"),
        ({"k_aux": 0}, "k_aux is 0"),
        ({"dead_tokens": 0}, "dead_tokens is 0"),
    ],
)
def test_impossible_specs_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        TopKSpec(**settings)
