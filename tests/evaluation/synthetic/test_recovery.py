"""Recovery metrics of constructed dictionaries, and against a dense implementation of the definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.core.codes import SparseCodes
from saebench.evaluation.synthetic import GroundTruth, ZipfWorld, recovery_metrics
from saebench.evaluation.synthetic.recovery import coincidences, mcc_hungarian

F = 40


@pytest.fixture(scope="module")
def truth():
    return ZipfWorld(n_features=F, d_in=24, true_l0=4).sample(2000, part="test")


def sparse(dense_NM):
    row_S, index_S = dense_NM.nonzero(as_tuple=True)
    counts = torch.bincount(row_S, minlength=len(dense_NM))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return SparseCodes.from_ragged(dense_NM[row_S, index_S], index_S, offsets, d_sae=dense_NM.shape[1])


def scores(W_dec_MD, dense_NM, truth):
    found = recovery_metrics(W_dec_MD, sparse(dense_NM), truth)
    return [found.mcc_hungarian, found.uniqueness, found.precision, found.recall, found.f1]


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(F)), st.booleans())
def test_permuted_and_negated_true_dictionary_is_perfect(truth, order, negative):
    rows_MD, z_NM = truth.features_FD[order], truth.codes.to_dense()[:, order]
    if negative:
        rows_MD, z_NM = -3 * rows_MD, -z_NM
    assert scores(rows_MD, z_NM, truth) == pytest.approx([1, 1, 1, 1, 1], abs=1e-5)


def test_duplicated_latents_lower_only_uniqueness(truth):
    twice = torch.arange(F).repeat(2)
    found = scores(truth.features_FD[twice], truth.codes.to_dense()[:, twice], truth)
    assert found == pytest.approx([1, 0.5, 1, 1, 1], abs=1e-5)


def test_dead_latents_count_as_zero_precision_and_recall(truth):
    z_NM = truth.codes.to_dense()
    z_NM[:, : F // 4] = 0
    assert scores(truth.features_FD, z_NM, truth) == pytest.approx([1, 1, 0.75, 0.75, 0.75], abs=1e-5)


def test_latents_that_always_fire_have_full_recall_and_low_precision(truth):
    z_NF = truth.codes.to_dense()
    always_NF = torch.ones_like(z_NF)
    found = recovery_metrics(truth.features_FD, sparse(always_NF), truth)
    assert found.recall == pytest.approx(1) and found.precision == pytest.approx(
        truth.frequency().mean().item()
    )


def test_matching_has_as_many_pairs_as_smaller_side(truth):
    few = truth.features_FD[:5]
    assert scores(few, truth.codes.to_dense()[:, :5], truth) == pytest.approx([1] * 5, abs=1e-5)
    noise_MD = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    more_MD = torch.cat([truth.features_FD, noise_MD])
    z_NM = torch.cat([truth.codes.to_dense(), torch.zeros(2000, 3)], dim=1)
    expected = [1, F / (F + 3), F / (F + 3), F / (F + 3), F / (F + 3)]
    assert scores(more_MD, z_NM, truth) == pytest.approx(expected, abs=1e-5)


def test_matching_is_optimal_not_greedy():
    assert mcc_hungarian(torch.tensor([[0.9, 0.8], [0.85, 0.1]])) == pytest.approx((0.8 + 0.85) / 2)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 30), m=st.integers(1, 12), f=st.integers(1, 9), seed=st.integers(0, 1000))
def test_firing_metrics_equal_dense_definitions(n, m, f, seed):
    generator = torch.Generator().manual_seed(seed)

    def random_codes(width):
        dense = torch.randn(n, width, generator=generator)
        return dense * (torch.rand(n, width, generator=generator) < 0.4)

    z_NM, g_NF = random_codes(m), random_codes(f).abs()
    rows_MD, features_FD = torch.randn(m, 5, generator=generator), torch.randn(f, 5, generator=generator)
    truth = GroundTruth(x_ND=g_NF @ features_FD, features_FD=features_FD, codes=sparse(g_NF))
    cosines_MF = torch.cosine_similarity(rows_MD[:, None], features_FD[None], dim=-1).abs()
    fires_NM, truly_NM = z_NM != 0, g_NF[:, cosines_MF.argmax(1)] > 0
    both_M = (fires_NM & truly_NM).sum(0).double()
    precision_M = (both_M / fires_NM.sum(0)).nan_to_num()
    recall_M = (both_M / truly_NM.sum(0)).nan_to_num()
    f1_M = (2 * precision_M * recall_M / (precision_M + recall_M)).nan_to_num()
    expected = [cosines_MF.argmax(1).unique().numel() / m, precision_M.mean(), recall_M.mean(), f1_M.mean()]
    assert scores(rows_MD, z_NM, truth)[1:] == pytest.approx([float(e) for e in expected])


def test_repeated_pick_counts_once_and_latent_without_feature_never():
    codes = SparseCodes.from_ragged(
        torch.tensor([1.0, 0.5, 2.0]), torch.tensor([0, 0, 1]), torch.tensor([0, 3]), d_sae=2
    )
    truth = GroundTruth(x_ND=torch.zeros(1, 2), features_FD=torch.eye(2), codes=sparse(torch.ones(1, 2)))
    assert coincidences(codes, truth, torch.tensor([1, -1])).tolist() == [1, 0]
