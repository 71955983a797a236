"""Mutual choice: exact budget over the batch, one threshold at inference, gradients by finite differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.core.errors import UserError
from saebench.runs.run import load
from saebench.saes.base import Batch
from saebench.saes.feature_choice import FeatureChoiceSAE, FeatureChoiceSpec
from saebench.saes.mutual_choice import MutualChoiceSAE, MutualChoiceSpec
from saebench.saes.registry import architecture
from saebench.saes.topk import TopKSAE, TopKSpec
from saebench.training.settings import TrainConfig


def make_sae(d_in=12, d_sae=40, k=5, seed=0, sae_class=MutualChoiceSAE, **options):
    sae = sae_class(sae_class.Spec(d_sae=d_sae, k=k, **options), d_in)
    generator = torch.Generator().manual_seed(seed)
    sae.initialize(Batch(rows(200, d_in, seed=seed + 1)), seed=seed)
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * torch.randn(d_sae, generator=generator))
    return sae


def rows(n, d_in=12, seed=1):
    """[n, d_in] of very different norms, so that tokens deserve different numbers of latents."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d_in, generator=generator) * torch.rand(n, 1, generator=generator).mul(2)


def pre_activations(sae, x_ND):
    return (x_ND - sae.b_dec) @ sae.W_enc + sae.b_enc


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 16), st.integers(1, 60), st.data())
def test_batch_keeps_k_times_n_entries_or_all_positive_ones(n, d_in, d_sae, data):
    k = data.draw(st.integers(1, d_sae))
    sae, x_ND = make_sae(d_in, d_sae, k), rows(n, d_in, seed=3)
    codes = sae.choose(Batch(x_ND))
    relu_NM = pre_activations(sae, x_ND).detach().relu()
    n_positive = int((relu_NM > 0).sum())
    assert int(codes.l0().sum()) == codes.values.numel() == min(k * n, n_positive)
    dense_NM = codes.to_dense()
    kept_NM = dense_NM > 0
    torch.testing.assert_close(dense_NM, relu_NM * kept_NM, rtol=1e-5, atol=1e-5)
    if n_positive > k * n:
        assert relu_NM[~kept_NM].max() <= relu_NM[kept_NM].min() + 1e-5


def test_rows_get_different_numbers_of_latents():
    assert len(set(make_sae().choose(Batch(rows(50))).l0().tolist())) > 5


def test_ties_go_to_the_first_rows_and_latents():
    """Equal latents on equal tokens: the budget is met, from the front."""
    sae = make_sae(k=3)
    with torch.no_grad():
        sae.W_enc_MD.copy_(sae.W_enc_MD[:1].expand(40, -1))
        sae.b_enc.fill_(0.5)
        sae.b_dec.zero_()
    x_ND = (sae.W_enc_MD[0] * torch.ones(4, 1)).detach()
    codes = sae.choose(Batch(x_ND))
    assert codes.l0().tolist() == [12, 0, 0, 0] and codes.indices.tolist() == list(range(12))


def test_its_total_affinity_is_at_least_that_of_the_constrained_choices():
    x_ND = rows(60)
    mutual, topk = make_sae(), TopKSAE(TopKSpec(d_sae=40, k=5), 12)
    feature = FeatureChoiceSAE(FeatureChoiceSpec(d_sae=40, k=5, mutual_share=0), 12)
    for other in (topk, feature):
        for name in ("W_enc_MD", "b_enc", "b_dec"):
            getattr(other, name).data.copy_(getattr(mutual, name))
    total, of_topk, of_feature = (
        sae.choose(Batch(x_ND)).values.double().sum() for sae in (mutual, topk, feature)
    )
    assert total > of_topk and total > of_feature


def test_batch_of_one_token_gives_topk():
    mutual, topk = make_sae(), TopKSAE(TopKSpec(d_sae=40, k=5), 12)
    topk.load_state_dict(mutual.state_dict(), strict=False)
    for seed in range(5):
        batch = Batch(rows(1, seed=seed))
        ours, theirs = mutual.loss(batch), topk.loss(batch)
        torch.testing.assert_close(ours.codes.to_dense(), theirs.codes.to_dense())
        torch.testing.assert_close(ours.total, theirs.total)
        for sae, terms in ((mutual, ours), (topk, theirs)):
            sae.zero_grad()
            terms.total.backward()
        for a, b in zip(mutual.parameters(), topk.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(0, 99))
def test_permuting_the_rows_permutes_the_choice(n, seed):
    sae, x_ND = make_sae(seed=seed), rows(n, seed=seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    permuted_NM = sae.choose(Batch(x_ND[order])).to_dense()
    torch.testing.assert_close(permuted_NM, sae.choose(Batch(x_ND)).to_dense()[order])


def test_gradients_equal_finite_differences_with_the_selection_fixed():
    """A dense float64 loss passes central differences; the sparse functions give its gradients."""
    x_ND, sae = rows(7).double(), make_sae()
    names = ("W_enc_MD", "b_enc", "b_dec", "W_dec")
    weights = [getattr(sae, name).detach().double().requires_grad_() for name in names]
    kept_NM = sae.choose(Batch(x_ND.float())).to_dense() > 0

    def dense_loss(W_enc_MD, b_enc_M, b_dec_D, W_dec_MD):
        z_NM = kept_NM * ((x_ND - b_dec_D) @ W_enc_MD.T + b_enc_M)
        return (x_ND - z_NM @ W_dec_MD - b_dec_D).square().mean()

    assert torch.autograd.gradcheck(dense_loss, weights, eps=1e-6, atol=1e-7)
    expected = torch.autograd.grad(dense_loss(*weights), weights)
    terms = sae.loss(Batch(x_ND.float()))
    torch.testing.assert_close(terms.total, dense_loss(*weights).float())
    got = torch.autograd.grad(terms.total, [getattr(sae, name) for name in names])
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference.float(), rtol=1e-4, atol=1e-5)


def test_a_batch_in_which_nothing_is_positive_costs_its_norm_and_moves_only_b_dec():
    sae, batch = make_sae(), Batch(rows(20))
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    terms = sae.loss(batch)
    terms.total.backward()
    sae.after_step(batch, terms)
    assert terms.extra["empty_tokens"] == 1 and terms.codes.values.numel() == 0
    torch.testing.assert_close(terms.total, (batch.x_ND - sae.b_dec).square().mean())
    assert sae.b_dec.grad.any() and not sae.W_enc_MD.grad.any() and not sae.W_dec.grad.any()
    assert all(tensor.isfinite().all() for tensor in sae.state_dict().values())


def test_the_share_of_empty_tokens_is_reported():
    sae, x_ND = make_sae(k=1), torch.cat([rows(30) * 10, rows(10) * 1e-3])
    with torch.no_grad():
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    terms = sae.loss(Batch(x_ND))
    empty = (terms.codes.l0() == 0).float().mean()
    assert terms.extra["empty_tokens"] == empty and empty >= 0.25


def test_inference_encodes_each_row_alone_by_a_threshold():
    sae, x_ND = make_sae(), rows(50)
    sae.threshold.fill_(0.3)
    pre_NM = pre_activations(sae, x_ND)
    codes = sae.encode(x_ND)
    torch.testing.assert_close(codes.to_dense(), pre_NM * (pre_NM > 0.3))
    for n in range(5):
        torch.testing.assert_close(sae.encode(x_ND[n]).to_dense(), codes.to_dense()[n])


def test_a_pre_activation_equal_to_the_threshold_is_cut():
    sae = make_sae()
    with torch.no_grad():
        sae.W_enc_MD.zero_()
        sae.b_enc.copy_(torch.arange(40.0))
    sae.threshold.fill_(30.0)
    assert sae.encode(rows(1)[0]).indices.tolist() == list(range(31, 40))


def test_calibrated_mean_l0_is_k_on_unseen_rows():
    sae = make_sae(d_in=16, d_sae=128, k=8)
    generator = torch.Generator().manual_seed(3)
    seen_ND, unseen_ND = torch.randn(2, 20_000, 16, generator=generator)
    sae.calibrate(seen_ND)
    assert sae.encode(seen_ND).l0().float().mean() == 8
    assert abs(sae.encode(unseen_ND).l0().float().mean() / 8 - 1) < 0.02


def test_with_fewer_positive_entries_than_the_budget_all_positive_ones_pass():
    sae = make_sae(k=40)
    sae.calibrate(rows(100))
    assert sae.threshold == 0
    relu_NM = pre_activations(sae, rows(20)).relu()
    torch.testing.assert_close(sae.encode(rows(20)).to_dense(), relu_NM)


def test_before_calibration_the_running_threshold_keeps_encode_usable():
    sae = MutualChoiceSAE(MutualChoiceSpec(d_sae=128, k=8), 16)
    sae.initialize(Batch(rows(3000, 16, seed=5)), seed=0)
    assert abs(sae.encode(rows(3000, 16)).l0().float().mean() / 8 - 1) < 0.1
    smallest = []
    for seed in range(3):
        batch = Batch(rows(500, 16, seed=seed))
        terms = sae.loss(batch)
        sae.after_step(batch, terms)
        smallest.append(terms.codes.values.detach().min())
    torch.testing.assert_close(sae.threshold, torch.stack(smallest).mean())
    assert abs(sae.encode(rows(3000, 16)).l0().float().mean() / 8 - 1) < 0.1


def test_the_choice_does_not_depend_on_the_statistic_that_speeds_it_up():
    sae, batch = make_sae(), Batch(rows(40))
    first = sae.choose(batch)
    for poison in (0.0, 0.1, 5.0, torch.inf, torch.nan, -1.0):
        sae.smallest_match.fill_(poison)
        other = sae.choose(batch)
        assert torch.equal(other.values, first.values) and torch.equal(other.indices, first.indices)
        assert torch.equal(other.row_offsets, first.row_offsets)


def test_the_threshold_is_saved_and_scaled_with_the_codes(tmp_path):
    sae, x_ND = make_sae(), rows(30)
    sae.calibrate(3.5 * rows(500, seed=8))
    dense_NM = sae.encode(3.5 * x_ND).to_dense() / 3.5
    sae.fold_scale(3.5)
    sae.save(tmp_path)
    again = load(tmp_path)
    assert torch.equal(again.threshold, sae.threshold) and again.threshold.shape == ()
    torch.testing.assert_close(again.encode(x_ND).to_dense(), dense_NM, rtol=1e-5, atol=1e-5)


def test_batchtopk_is_another_name_for_it():
    assert architecture("batchtopk") is MutualChoiceSAE
    assert TrainConfig(cache="c", out="o", sae="batchtopk").sae == "mutual-choice"
    with pytest.raises(UserError, match="--sae batchk is not an SAE architecture"):
        TrainConfig(cache="c", out="o", sae="batchk")
