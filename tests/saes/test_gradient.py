"""Gradient SAE: where it equals TopK, how the score changes the picks, and that the score has no gradient."""

import copy
import dataclasses
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saebench as sb
from saebench.core.codes import SparseCodes
from saebench.core.errors import UserError
from saebench.runs.run import load
from saebench.saes import gradient as module
from saebench.saes.base import SAE, Batch
from saebench.saes.gradient import GradientSAE, GradientSpec

D_IN, D_SAE, K = 12, 40, 5


def rows(n=30, seed=1, d_in=D_IN):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


def make_sae(beta=1.0, seed=0, k=K, **options):
    sae = GradientSAE(GradientSpec(d_sae=D_SAE, k=k, beta=beta, **options), D_IN)
    sae.initialize(Batch(rows(200, 7), 0.01 * rows(200, 8)), seed=seed)
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * rows(1, 9, D_SAE)[0])
    return sae


def with_beta(sae, beta):
    """The same weights and another beta."""
    other = copy.deepcopy(sae)
    other.spec = dataclasses.replace(sae.spec, beta=beta)
    return other


def oracle(sae, x_ND, g_ND):
    return sae.encode(x_ND, inference="oracle", gradient=g_ND).to_dense()


def parts(sae, x_ND, g_ND):
    """z [N, M] and |D g| [N, M], from their definitions."""
    return ((x_ND - sae.b_dec) @ sae.W_enc + sae.b_enc).relu(), (g_ND @ sae.W_dec.T).abs()


def picks(codes):
    return codes.to_dense() > 0


gradients = st.sampled_from([1e-4, 0.01, 1.0, 100.0]).map(lambda size: size * rows(30, 3))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([0.0, 0.3, 1.0, 10.0]), gradients, st.integers(0, 99))
def test_the_values_of_the_k_largest_scores_are_kept(beta, g_ND, seed):
    sae, x_ND = make_sae(beta, seed), rows(seed=seed)
    z_NM, influence_NM = parts(sae, x_ND, g_ND)
    score_NM = z_NM * (1 + beta * sae.gradient_scale * influence_NM)
    top_NK = score_NM.topk(K, dim=1).indices
    expected_NM = torch.zeros_like(z_NM).scatter(1, top_NK, z_NM.gather(1, top_NK))
    codes = sae.encode(x_ND, inference="oracle", gradient=g_ND)
    torch.testing.assert_close(codes.to_dense(), expected_NM, rtol=1e-5, atol=1e-6)
    trained = sae.loss(Batch(x_ND, g_ND))
    assert torch.equal(trained.codes.to_dense(), codes.to_dense())
    x_hat_ND = x_ND - trained.error
    torch.testing.assert_close(x_hat_ND, expected_NM @ sae.W_dec + sae.b_dec, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99))
def test_without_beta_or_gradient_or_difference_it_is_topk(seed):
    x_ND, g_ND = rows(seed=seed), rows(seed=seed + 1)
    sae = make_sae(10.0, seed)
    plain = sae.encode(x_ND).to_dense()
    assert not torch.equal(oracle(sae, x_ND, g_ND), plain)
    assert torch.equal(oracle(with_beta(sae, 0.0), x_ND, g_ND), plain)
    assert torch.equal(oracle(sae, x_ND, torch.zeros_like(g_ND)), plain)
    with torch.no_grad():
        sae.W_dec[:, 0] = 0.5  # d_i . e_0 is the same for all latents
    e_0_ND = torch.zeros_like(g_ND)
    e_0_ND[:, 0] = g_ND[:, 0]
    assert torch.equal(oracle(sae, x_ND, e_0_ND), plain)


@settings(max_examples=30, deadline=None)
@given(gradients, st.sampled_from([0.25, 2.0, 1024.0]), st.integers(0, 99))
def test_only_beta_times_the_size_of_the_gradient_counts(g_ND, factor, seed):
    sae, x_ND = make_sae(3.0, seed), rows(seed=seed)
    expected = oracle(sae, x_ND, g_ND)
    assert torch.equal(oracle(sae, x_ND, -g_ND), expected)
    assert torch.equal(oracle(with_beta(sae, 3.0 / factor), x_ND, factor * g_ND), expected)


def test_the_scale_makes_the_mean_influence_one_and_absorbs_the_unit_of_the_loss():
    sae, sample = make_sae(), Batch(rows(200, 7), 0.01 * rows(200, 8))
    influence_NM = (sample.gradient_ND @ sae.W_dec.T).abs()
    torch.testing.assert_close(sae.gradient_scale * influence_NM.mean(), torch.tensor(1.0))
    torch.testing.assert_close(sae.influence, influence_NM.mean(0))
    other = GradientSAE(sae.spec, D_IN)
    other.initialize(Batch(sample.x_ND, 64 * sample.gradient_ND), seed=0)
    assert torch.equal(other.gradient_scale * 64, sae.gradient_scale)
    assert torch.equal(other.W_enc_MD, sae.W_enc_MD)
    many = GradientSAE(GradientSpec(d_sae=D_SAE, k=K), D_IN)
    module_bytes = module._CHUNK_BYTES
    try:
        module._CHUNK_BYTES = 4 * D_SAE * 7
        many.initialize(sample, seed=0)
    finally:
        module._CHUNK_BYTES = module_bytes
    torch.testing.assert_close(many.gradient_scale, sae.gradient_scale)


def test_the_encoder_begins_at_the_best_scale_for_its_own_choice():
    sae, batch = GradientSAE(GradientSpec(d_sae=D_SAE, k=K, beta=10), D_IN), Batch(rows(200, 7), rows(200, 8))
    sae.initialize(batch, seed=0)
    best = sae.loss(batch).reconstruction
    for factor in (0.95, 1.05):
        with torch.no_grad():
            sae.W_enc_MD.mul_(factor)
        assert sae.loss(batch).reconstruction > best
        with torch.no_grad():
            sae.W_enc_MD.div_(factor)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([0.0, 1.0, 1e6]), gradients, st.integers(-3, 1), st.integers(0, 99))
def test_a_silent_latent_is_never_picked_ahead_of_a_firing_one(beta, g_ND, bias, seed):
    sae, x_ND = make_sae(beta, seed), rows(seed=seed)
    with torch.no_grad():
        sae.b_enc.fill_(float(bias))
    z_NM, _ = parts(sae, x_ND, g_ND)
    codes = sae.encode(x_ND, inference="oracle", gradient=g_ND)
    assert torch.equal(codes.l0(), (z_NM > 0).sum(1).clamp_max(K))


def test_a_large_beta_ranks_by_the_effect_on_the_loss_alone():
    sae, x_ND, g_ND = make_sae(1e6), rows(), rows(seed=2)
    z_NM, influence_NM = parts(sae, x_ND, g_ND)
    by_effect = (z_NM * influence_NM).topk(K, dim=1).indices
    expected = torch.zeros(30, D_SAE, dtype=torch.bool).scatter(1, by_effect, True)
    assert torch.equal(picks(sae.encode(x_ND, inference="oracle", gradient=g_ND)), expected)
    assert not torch.equal(expected, picks(sae.encode(x_ND)))


def test_no_gradient_flows_through_the_score():
    """A dense float64 loss with the choice held fixed passes central differences; these are the gradients."""
    sae, x_ND, g_ND = make_sae(3.0), rows(7), rows(7, 2)
    names = ("W_enc_MD", "b_enc", "b_dec", "W_dec")
    weights = [getattr(sae, name).detach().double().requires_grad_() for name in names]
    kept_NM = picks(sae.encode(x_ND, inference="oracle", gradient=g_ND))
    assert not torch.equal(kept_NM, picks(sae.encode(x_ND)))

    def dense_loss(W_enc_MD, b_enc_M, b_dec_D, W_dec_MD):
        z_NM = ((x_ND.double() - b_dec_D) @ W_enc_MD.T + b_enc_M).relu() * kept_NM
        return (x_ND.double() - z_NM @ W_dec_MD - b_dec_D).square().mean()

    assert torch.autograd.gradcheck(dense_loss, weights, eps=1e-6, atol=1e-7)
    expected = torch.autograd.grad(dense_loss(*weights), weights)
    got = torch.autograd.grad(sae.loss(Batch(x_ND, g_ND)).total, [getattr(sae, name) for name in names])
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference.float(), rtol=1e-4, atol=1e-5)


def test_the_score_is_the_models_loss_to_first_order():
    """Taking away a little of one latent changes the demo model's loss by -eps z_i (d_i . g)."""
    model = sb.load_model("demo")
    model.module.double()
    hook, length = "blocks.2.hook_resid_post", torch.tensor([24])
    tokens_BT = torch.randint(0, model.vocab_size, (1, 24), generator=torch.Generator().manual_seed(0))
    found, at = model.gradients(tokens_BT, length, [hook])
    x_TD, g_TD = found[hook][0], at[hook][0]
    sae = GradientSAE(GradientSpec(d_sae=64, k=8, beta=3), 256)
    sae.initialize(Batch(x_TD[:-1].float(), g_TD[:-1].float()), seed=0)
    indices_TK, values_TK = sae.encode(x_TD, inference="oracle", gradient=g_TD).rectangular()

    def loss(edit):
        log_p = model.logits(tokens_BT, edit={hook: edit})[0].double().log_softmax(-1)
        return -log_p[torch.arange(23), tokens_BT[0, 1:]].sum()

    for t, slot in ((1, 0), (11, 3), (22, 7)):
        z, d_D = values_TK[t, slot].double(), sae.W_dec[indices_TK[t, slot]].detach().double()
        change = torch.zeros(1, 24, 256, dtype=torch.float64)
        change[0, t] = 1e-4 * z * d_D
        slope = (loss(lambda x, c=change: x - c) - loss(lambda x, c=change: x + c)) / 2e-4
        torch.testing.assert_close(slope, -z * (d_D @ g_TD[t].double()), rtol=1e-4, atol=1e-6)


def test_plain_proxy_and_oracle_choose_by_their_scores():
    sae, x_ND, g_ND = make_sae(10.0), rows(), rows(seed=2)
    z_NM, _ = parts(sae, x_ND, g_ND)
    plain = torch.zeros_like(z_NM).scatter(1, z_NM.topk(K).indices, z_NM.topk(K).values)
    torch.testing.assert_close(sae.encode(x_ND).to_dense(), plain)
    assert torch.equal(sae.encode(x_ND, inference="plain").to_dense(), sae.encode(x_ND).to_dense())
    with torch.no_grad():
        sae.influence.copy_(
            torch.rand(D_SAE, generator=torch.Generator().manual_seed(0)) / sae.gradient_scale
        )
    top_NK = (z_NM * (1 + 10 * sae.gradient_scale * sae.influence)).topk(K).indices
    proxy = torch.zeros_like(z_NM).scatter(1, top_NK, z_NM.gather(1, top_NK))
    torch.testing.assert_close(sae.encode(x_ND, inference="proxy").to_dense(), proxy)
    assert not torch.equal(proxy > 0, plain > 0)
    shaped = sae.encode(x_ND.view(2, 15, -1), inference="oracle", gradient=g_ND.view(2, 15, -1))
    assert shaped.leading_shape == (2, 15)
    whole = sae.encode(x_ND, inference="oracle", gradient=g_ND).to_dense()
    assert torch.equal(shaped.to_dense().view(30, -1), whole)
    one = sae.encode(x_ND[3], inference="oracle", gradient=g_ND[3].bfloat16().float())
    assert one.leading_shape == ()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"inference": "oracle"}, "needs gradient"),
        ({"inference": "proxy", "gradient": rows()}, "the other modes take none"),
        ({"gradient": rows()}, "the other modes take none"),
        ({"inference": "best"}, "give one of plain, proxy, oracle"),
        ({"inference": "oracle", "gradient": rows() / 0}, "gradient holds NaN or infinity"),
        (
            {"inference": "oracle", "gradient": rows(29)},
            r"gradient has shape \(29, 12\); it must be \(30, 12\)",
        ),
    ],
)
def test_unknown_inference_and_bad_gradients_are_refused(how, message):
    with pytest.raises(ValueError, match=message):
        make_sae().encode(rows(), **how)


def test_batches_without_gradients_and_gradients_without_content_are_refused():
    sae = make_sae()
    with pytest.raises(ValueError, match="gradient_ND"):
        sae.loss(Batch(rows()))
    for bad in (torch.zeros(30, D_IN), torch.full((30, D_IN), torch.nan)):
        with pytest.raises(UserError, match="all zero or not finite"):
            sae.initialize(Batch(rows(), bad), seed=0)
    with pytest.raises(UserError, match="beta is -1"):
        GradientSpec(beta=-1)


def test_changed_picks_are_those_that_the_default_inference_does_not_make():
    def codes(indices, values):
        return SparseCodes.from_topk(torch.tensor(values), torch.tensor(indices), d_sae=9)

    plain = codes([[1, 2, 3], [4, 5, 0]], [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    mine = codes([[3, 1, 7], [4, 0, 8]], [[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    sae = make_sae(3.0)
    for changed_picks in (sae.changed_picks, partial(SAE.changed_picks, sae)):
        assert changed_picks(mine, plain) == (2, 5) and changed_picks(plain, plain) == (0, 5)
        assert changed_picks(codes([[1]], [[0.0]]), codes([[2]], [[0.0]])) == (0, 0)
    x_ND, g_ND = rows(300), rows(300, 2)
    changed = [
        with_beta(sae, beta).loss(Batch(x_ND, g_ND)).extra["picks_changed"] for beta in (0.0, 0.3, 3.0)
    ]
    assert changed[0] == 0 < changed[1] < changed[2] < 1
    first = slice(0, 256)
    mine, others = sae.encode(x_ND[first], inference="oracle", gradient=g_ND[first]), sae.encode(x_ND[first])
    n_changed, n_picks = sae.changed_picks(mine, others)
    assert sae.loss(Batch(x_ND, g_ND)).extra["picks_changed"] == n_changed / n_picks


def test_influence_is_a_running_mean_and_is_saved(tmp_path):
    sae = make_sae(3.0)
    seen = [sae.influence.clone()]
    for step in range(150):
        batch = Batch(rows(20, step), rows(20, step + 1))
        seen.append((batch.gradient_ND @ sae.W_dec.T).abs().mean(0).detach())
        sae.after_step(batch, sae.loss(batch))
        if step == 50:
            torch.testing.assert_close(sae.influence, torch.stack(seen).mean(0))
    expected = torch.stack(seen[:100]).mean(0)
    for mean_M in seen[100:]:
        expected = expected.lerp(mean_M, 0.01)
    torch.testing.assert_close(sae.influence, expected)
    sae.save(tmp_path)
    again, x_ND, g_ND = load(tmp_path), rows(), rows(seed=2)
    for how in ({}, {"inference": "proxy"}, {"inference": "oracle", "gradient": g_ND}):
        assert torch.equal(again.encode(x_ND, **how).to_dense(), sae.encode(x_ND, **how).to_dense())


def test_folding_the_input_scale_changes_units_and_nothing_else():
    sae, x_ND, g_ND = make_sae(3.0), rows(), rows(seed=2)
    ways = [{}, {"inference": "proxy"}, {"inference": "oracle", "gradient": g_ND}]
    before = [sae.encode(3.5 * x_ND, **how).to_dense() / 3.5 for how in ways]
    sae.fold_scale(3.5)
    for how, expected in zip(ways, before, strict=True):
        torch.testing.assert_close(sae.encode(x_ND, **how).to_dense(), expected, rtol=1e-5, atol=1e-5)


def test_a_low_precision_scan_only_proposes():
    sae, x_ND, g_ND = make_sae(3.0), rows(), rows(seed=2)
    sae.compute_dtype = torch.bfloat16
    z_NM, _ = parts(sae, x_ND, g_ND)
    dense_NM = sae.encode(x_ND, inference="oracle", gradient=g_ND).to_dense()
    torch.testing.assert_close(dense_NM[dense_NM > 0], z_NM[dense_NM > 0], rtol=1e-5, atol=1e-6)
