"""Feature choice: exact budgets of columns, aux_zipf, thresholds per latent, the two phases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.core.errors import UserError
from saebench.runs.run import load
from saebench.saes.base import Batch
from saebench.saes.feature_choice import FeatureChoiceSAE, FeatureChoiceSpec
from saebench.saes.mutual_choice import MutualChoiceSAE, MutualChoiceSpec
from saebench.saes.zipf import ZipfLaw
from saebench.training import train
from saebench_kernels import AuxCandidates, aux_k

LATE = 0.9


def make_sae(d_in=12, d_sae=40, k=5, seed=0, density=None, **options):
    sae = FeatureChoiceSAE(FeatureChoiceSpec(d_sae=d_sae, k=k, **options), d_in)
    sae.initialize(Batch(rows(200, d_in)), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * torch.randn(d_sae, generator=generator))
    sae.density.copy_(torch.rand(d_sae, generator=generator) if density is None else density)
    sae.steps_seen.fill_(0 if density is None else 100)
    return sae


def rows(n, d_in=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d_in, generator=generator) * torch.rand(n, 1, generator=generator).mul(2)


def late(n, d_in=12, seed=1):
    """A batch of the phase in which latents choose."""
    return Batch(rows(n, d_in, seed), progress=LATE)


def relu_of(sae, x_ND):
    return ((x_ND - sae.b_dec) @ sae.W_enc + sae.b_enc).relu().detach()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(1, 50),
    st.sampled_from(["zipf", "uniform"]),
    st.data(),
)
def test_each_column_keeps_its_budget_of_its_largest_entries(n, d_in, d_sae, kind, data):
    k = data.draw(st.integers(1, d_sae))
    sae, batch = make_sae(d_in, d_sae, k, budgets=kind), late(n, d_in)
    budgets_M, dense_NM = sae.budgets(n), sae.choose(batch).to_dense()
    assert int(budgets_M.sum()) == k * n and int(budgets_M.max()) <= n
    if k * n >= d_sae:
        assert int(budgets_M.min()) >= 1
    relu_NM, kept_NM = relu_of(sae, batch.x_ND), dense_NM > 0
    assert torch.equal(kept_NM.sum(0), (relu_NM > 0).sum(0).minimum(budgets_M))
    torch.testing.assert_close(dense_NM, relu_NM * kept_NM, rtol=1e-5, atol=1e-5)
    passed_over_M = relu_NM.masked_fill(kept_NM, -1).max(0).values
    smallest_M = relu_NM.masked_fill(~kept_NM, torch.inf).min(0).values
    assert ((passed_over_M <= smallest_M + 1e-5) | (budgets_M == 0)).all()


def test_budgets_of_all_rows_make_it_a_dense_relu():
    sae, batch = make_sae(k=40, budgets="uniform"), late(30)
    assert (sae.budgets(30) == 30).all()
    torch.testing.assert_close(sae.choose(batch).to_dense(), relu_of(sae, batch.x_ND))


def test_the_more_a_latent_fires_the_larger_its_budget():
    density_M = ZipfLaw(0.8, 0.0).log_weights(40).exp()[torch.randperm(40)].float()
    sae = make_sae(density=density_M / density_M.sum() * 5)
    budgets_M = sae.budgets(200)
    assert (budgets_M[density_M.argsort(descending=True)].diff() <= 0).all()
    torch.testing.assert_close(budgets_M / 200, density_M / density_M.sum() * 5, rtol=0.05, atol=0.005)
    uniform = make_sae(density=density_M, budgets="uniform").budgets(201)
    assert uniform.max() - uniform.min() <= 1 and uniform.sum() == 5 * 201
    fixed = make_sae(density=density_M, zipf_exponent=0.0, zipf_shift=0.0)
    assert torch.equal(fixed.budgets(200), make_sae(density=density_M, budgets="uniform").budgets(200))


def test_every_latent_with_a_positive_entry_gets_an_encoder_gradient():
    sae, batch = make_sae(aux_coefficient=0.0), late(60)
    assert (sae.budgets(60) >= 1).all()
    terms = sae.loss(batch)
    terms.total.backward()
    positive_M = relu_of(sae, batch.x_ND).max(0).values > 0
    assert torch.equal(sae.W_enc_MD.grad.abs().sum(1) > 0, positive_M) and positive_M.all()


def test_tokens_without_a_match_are_possible_and_reported():
    sae, x_ND = make_sae(k=1), torch.cat([rows(60) * 10, rows(20) * 1e-3])
    with torch.no_grad():
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    terms = sae.loss(Batch(x_ND, progress=LATE))
    empty = (terms.codes.l0() == 0).float().mean()
    assert terms.extra["empty_tokens"] == empty and empty > 0.2


def test_gradients_equal_finite_differences_with_the_selection_fixed():
    """A dense float64 loss passes central differences; the sparse functions give its gradients.

    The residual, the under-use and what aux_zipf picks are held fixed; x - b_dec is no path of aux_zipf.
    """
    batch, sae = late(20), make_sae(k_aux=6, gamma=1.0)
    sae.density[:9] = 0.0
    x_ND = batch.x_ND.double()
    names = ("W_enc_MD", "b_enc", "b_dec", "W_dec")
    weights = [getattr(sae, name).detach().double().requires_grad_() for name in names]
    kept_NM = sae.choose(batch).to_dense() > 0
    under_M = sae.under_use(20).double()
    error_ND = (x_ND - sae.decode(sae.choose(batch)).double()).detach()
    variance = (error_ND - error_ND.mean(0)).square().sum()
    centered_ND = x_ND - sae.b_dec.detach().double()
    pre_NM = (centered_ND @ sae.W_enc.double() + sae.b_enc.double()).detach().relu()
    best_NK = pre_NM.masked_fill(under_M == 0, -1).topk(6, dim=1).indices
    picked_NM = torch.zeros_like(pre_NM, dtype=torch.bool).scatter(1, best_NK, True) & (pre_NM > 0)
    assert 6 < (under_M > 0).sum() < 40 and ((under_M > 0) & (under_M < 1)).any()

    def dense_loss(W_enc_MD, b_enc_M, b_dec_D, W_dec_MD):
        z_NM = kept_NM * ((x_ND - b_dec_D) @ W_enc_MD.T + b_enc_M)
        e_hat_ND = (picked_NM * under_M * (centered_ND @ W_enc_MD.T + b_enc_M)) @ W_dec_MD
        aux = (error_ND - e_hat_ND).square().sum() / variance
        return (x_ND - z_NM @ W_dec_MD - b_dec_D).square().mean() + aux / 32

    assert torch.autograd.gradcheck(dense_loss, weights, eps=1e-6, atol=1e-7)
    expected = torch.autograd.grad(dense_loss(*weights), weights)
    terms = sae.loss(batch)
    torch.testing.assert_close(terms.total, dense_loss(*weights).float())
    got = torch.autograd.grad(terms.total, [getattr(sae, name) for name in names])
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_aux_zipf_is_aux_k_when_latents_are_dead_or_used_enough(gamma):
    """With gamma 0, and for any gamma when every density is 0 or at least gamma times the expected one."""
    sae, batch = make_sae(gamma=gamma, k_aux=4, zipf_exponent=0.0, zipf_shift=0.0), late(60)
    dead = torch.tensor([1, 7, 11, 12, 30, 31])
    sae.density.copy_(0.6 * sae.expected_density(60))
    if gamma == 0:
        sae.density[2:6] = 1e-9
    sae.density[dead] = 0.0
    sae.tokens_since_fired[dead] = sae.dead_after
    error_ND = torch.randn(60, 12, generator=torch.Generator().manual_seed(5))
    ours = sae.auxiliary_loss(batch, error_ND)
    candidates = AuxCandidates(dead, torch.ones(len(dead)), 4)
    W_enc_MD, b_enc_M, W_dec_MD, b_dec_D, _ = sae.weights
    reference = aux_k(batch.x_ND, error_ND, candidates, W_enc_MD, b_enc_M, W_dec_MD, b_dec_D)
    assert torch.equal(ours, reference)
    for loss in (ours, reference):
        sae.zero_grad()
        loss.backward()
        touched_M = sae.W_enc_MD.grad.any(1)
        assert touched_M[dead].any() and not touched_M[[0, 2, 3, 4, 5]].any()


def test_under_use_rises_from_gamma_times_the_expected_density_to_none():
    sae = make_sae(gamma=0.5, zipf_exponent=0.0, zipf_shift=0.0)
    sae.density.copy_(torch.linspace(0, 1, 40) * 5 / 40)
    expected_M = (1 - torch.linspace(0, 1, 40) / 0.5).clamp_min(0)
    torch.testing.assert_close(sae.under_use(200), expected_M)
    sae.tokens_since_fired[39] = sae.dead_after
    assert sae.under_use(200)[39] == 1


def test_without_under_used_latents_aux_zipf_is_zero_and_so_is_its_gradient():
    sae = make_sae(zipf_exponent=0.0, zipf_shift=0.0, density=torch.full((40,), 5 / 40))
    aux = sae.auxiliary_loss(late(30), rows(30))
    assert aux == 0 and not aux.requires_grad


def test_schedule_is_mutual_choice_then_feature_choice():
    sae, mutual = make_sae(mutual_share=0.3), MutualChoiceSAE(MutualChoiceSpec(d_sae=40, k=5), 12)
    for name in ("W_enc_MD", "W_dec", "b_enc", "b_dec"):
        getattr(mutual, name).data.copy_(getattr(sae, name))
    for progress in (0.0, 0.29):
        ours, theirs = (s.loss(Batch(rows(50), progress=progress)) for s in (sae, mutual))
        assert torch.equal(ours.total, theirs.total) and torch.equal(ours.codes.indices, theirs.codes.indices)
    for progress in (0.3, 0.99):
        columns_M = torch.bincount(sae.choose(Batch(rows(50), progress=progress)).indices, minlength=40)
        assert torch.equal(columns_M, (relu_of(sae, rows(50)) > 0).sum(0).minimum(sae.budgets(50)))


def test_densities_are_learned_and_the_law_is_fitted_once_when_mutual_choice_ends():
    sae, fired = make_sae(mutual_share=0.5), []
    for step in range(8):
        batch = Batch(rows(60, seed=step), progress=step / 8)
        if step == 4:
            fitted = sae.zipf_law(60)
        terms = sae.loss(batch)
        sae.after_step(batch, terms)
        fired.append(terms.codes.to_dense().gt(0).float().mean(0))
        torch.testing.assert_close(sae.density, torch.stack(fired).mean(0))
        assert (sae.law >= 0).all() == (step >= 4)
    assert fitted == sae.zipf_law(60) == tuple(sae.law.tolist()) != ZipfLaw(1.0, 0.0)


def test_the_law_can_count_matches_or_ranks():
    density_M = ZipfLaw(0.5, 0.0).log_weights(40).exp().float() / 3
    density_M[25:] /= 30  # the rare end falls off
    of_density, of_rank = (
        make_sae(density=density_M, zipf_weights=by, zipf_shift=0.0).zipf_law(200).exponent
        for by in ("density", "rank")
    )
    assert abs(of_density - 0.5) < 0.25 and of_rank > 1


def threshold_of(sae, batch):
    codes = sae.choose(batch)
    return sae.batch_threshold(batch, codes, sae.smallest_of(codes))


def test_thresholds_follow_the_smallest_match_of_each_column():
    sae, batch = make_sae(), late(60)
    with torch.no_grad():
        sae.b_enc[3] = -100.0
    dense_NM, budgets_M = sae.choose(batch).to_dense(), sae.budgets(60)
    full_M = (dense_NM > 0).sum(0) == budgets_M
    smallest_M = dense_NM.masked_fill(dense_NM == 0, torch.inf).min(0).values
    expected_M = torch.where(full_M, smallest_M, 0.0)
    assert full_M.any() and not full_M[3]
    torch.testing.assert_close(threshold_of(sae, batch), expected_M)
    for progress in (0.0, 0.1, LATE):  # those of the mutual phase are forgotten
        batch = Batch(batch.x_ND, progress=progress)
        sae.after_step(batch, sae.loss(batch))
    torch.testing.assert_close(sae.threshold, threshold_of(sae, batch))
    other = late(60, seed=2)
    both = torch.stack([sae.threshold, threshold_of(sae, other)])
    sae.after_step(other, sae.loss(other))
    torch.testing.assert_close(sae.threshold, both.mean(0))


def test_calibration_is_one_factor_that_gives_k_in_the_mean_on_unseen_rows():
    sae = make_sae(d_in=16, d_sae=128, k=8)
    generator = torch.Generator().manual_seed(3)
    seen_ND, unseen_ND = torch.randn(2, 20_000, 16, generator=generator)
    for _ in range(4):
        batch = Batch(torch.randn(500, 16, generator=generator), progress=LATE)
        sae.after_step(batch, sae.loss(batch))
    before_M = sae.threshold * 1.7  # as far off as a law of other rows would make it
    sae.threshold.copy_(before_M)
    sae.calibrate(seen_ND)
    factor_M = (sae.threshold / before_M)[before_M > 0]
    assert len(factor_M) > 60
    torch.testing.assert_close(factor_M, factor_M.mean().expand_as(factor_M))
    assert abs(sae.encode(seen_ND).l0().float().mean() - 8) < 0.01
    assert abs(sae.encode(unseen_ND).l0().float().mean() / 8 - 1) < 0.02
    pre_NM = (unseen_ND - sae.b_dec) @ sae.W_enc + sae.b_enc
    torch.testing.assert_close(sae.encode(unseen_ND).to_dense(), pre_NM * (pre_NM > sae.threshold))


def test_calibration_copes_with_latents_that_never_filled_their_budget():
    sae, x_ND = make_sae(k=3), rows(800)
    sae.threshold[5:25] = 0.0
    sae.calibrate(x_ND)
    assert abs(sae.encode(x_ND).l0().float().mean() - 3) < 0.01 or (sae.threshold[:5] > 100).all()
    sae.threshold.zero_()
    sae.calibrate(x_ND)
    assert abs(sae.encode(x_ND).l0().float().mean() - 3) < 0.01


def test_a_latent_without_a_budget_hardly_fires():
    sae = make_sae(k=1, floor=0, zipf_exponent=8.0, zipf_shift=0.0)
    for seed in range(3):
        sae.after_step(late(60, seed=seed), sae.loss(late(60, seed=seed)))
    without = sae.budgets(60) == 0
    assert without.any() and sae.threshold.isfinite().all()
    assert (sae.encode(rows(300, seed=9)).to_dense()[:, without] > 0).float().mean() < 0.01


def test_thresholds_are_saved_and_scaled_with_the_codes(tmp_path):
    sae, x_ND = make_sae(), rows(30)
    sae.after_step(late(60), sae.loss(late(60)))
    dense_NM = sae.encode(3.5 * x_ND).to_dense() / 3.5
    sae.fold_scale(3.5)
    sae.save(tmp_path)
    again = load(tmp_path)
    assert torch.equal(again.threshold, sae.threshold) and again.threshold.shape == (40,)
    torch.testing.assert_close(again.encode(x_ND).to_dense(), dense_NM, rtol=1e-5, atol=1e-5)


def test_budgets_that_cannot_be_met_are_refused_before_anything_is_read(tmp_path):
    spec = FeatureChoiceSpec(d_sae=4096, k=8)
    spec.check(batch_size=512, n_steps=9)
    with pytest.raises(
        UserError, match="8 times batch_size = 511 is 4,088 matches, too few for each of d_sae"
    ):
        spec.check(batch_size=511, n_steps=9)
    FeatureChoiceSpec(d_sae=4096, k=8, floor=0).check(batch_size=1, n_steps=9)


def test_a_run_without_a_step_of_feature_choice_is_refused():
    for share, n_steps in ((0.9999, 10), (0.91, 11), (0.75, 3), (0.5, 1)):
        with pytest.raises(
            UserError, match=f"mutual_share is {share}, which leaves none of the {n_steps} steps"
        ):
            FeatureChoiceSpec(mutual_share=share).check(batch_size=4096, n_steps=n_steps)
    for share, n_steps in ((0.9, 10), (0.75, 4), (0.0, 1)):
        FeatureChoiceSpec(mutual_share=share).check(batch_size=4096, n_steps=n_steps)


@pytest.mark.parametrize(("exponent", "shift"), [(1000.0, 0.0), (500.0, "fit"), ("fit", 1e308), (2.0, 1e308)])
def test_extreme_laws_give_whole_budgets(exponent, shift):
    density_M = torch.linspace(0.01, 0.2, 40)
    sae = make_sae(density=density_M, zipf_exponent=exponent, zipf_shift=shift)
    budgets_M = sae.budgets(200)
    assert int(budgets_M.sum()) == 5 * 200 and budgets_M.min() >= 1 and budgets_M.max() <= 200
    assert sae.zipf_law(200) == sae.zipf_law(200), "no NaN"
    if shift == 1e308:
        assert (budgets_M == 25).all(), "all ranks weigh the same"


def test_a_run_whose_budgets_cannot_be_met_leaves_nothing(make_cache, tmp_path):
    cache = make_cache(tmp_path / "cache", rows(2000))
    with pytest.raises(UserError, match="pass --floor 0"):
        train(
            cache=cache.path,
            out=tmp_path / "run",
            sae="feature-choice",
            d_sae=64,
            k=2,
            batch_size=31,
            tokens=310,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mutual_share": 1.0}, "mutual_share is 1.0, which leaves no step"),
        ({"mutual_share": -0.1}, "mutual_share is -0.1"),
        ({"gamma": 1.5}, "gamma is 1.5"),
        ({"gamma": math.nan}, "gamma is nan"),
        ({"floor": -1}, "floor is -1"),
        ({"zipf_exponent": -1.0}, "zipf_exponent is -1.0"),
        ({"zipf_shift": -0.5}, "zipf_shift is -0.5"),
        ({"zipf_exponent": 1e300}, r"zipf_exponent is 1e\+300; give .fit. or at most 1000"),
    ],
)
def test_impossible_specs_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        FeatureChoiceSpec(**settings)
