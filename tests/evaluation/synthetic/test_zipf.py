"""``ZipfWorld``: frequencies, and the number of features per token for each difficulty."""

import pytest
import torch

from saebench.evaluation.synthetic.zipf import ZipfWorld

N = 40_000


@pytest.fixture(scope="module", params=["constant", "poisson", "lognormal"])
def world(request):
    return ZipfWorld(difficulty=request.param)


@pytest.fixture(scope="module")
def truth(world):
    return world.sample(N)


def test_difficulties_have_equal_mean_l0_and_stated_deviation(world, truth):
    l0_N = truth.codes.l0().double()
    assert abs(l0_N.mean() - world.true_l0) < 4.5 * max(l0_N.std().item() / N**0.5, 1e-9)
    assert l0_N.min() >= 1
    expected_sd = {"constant": 0.0, "poisson": 7**0.5, "lognormal": 7 * (2.718281828 ** (0.75**2) - 1) ** 0.5}
    assert l0_N.std().item() == pytest.approx(expected_sd[world.difficulty], rel=0.05)


def test_frequencies_follow_capped_zipf_distribution(world, truth):
    law_F = world.frequencies()
    assert law_F.sum().item() == pytest.approx(world.true_l0)
    assert law_F.max() <= 0.5 and (law_F.diff() <= 0).all()
    uncapped = law_F < 0.5
    rank = torch.arange(1, 257, dtype=torch.float64)[uncapped]
    torch.testing.assert_close(law_F[uncapped] * rank, (law_F[uncapped] * rank)[:1].expand(len(rank)))
    # In the data: the slope of log frequency over log rank, where tokens are not saturated.
    tail = slice(20, 256)
    log_rank, log_seen = torch.arange(21, 257).double().log(), truth.frequency()[tail].log()
    centered = log_rank - log_rank.mean()
    slope = (centered @ log_seen / centered.square().sum()).item()
    assert slope == pytest.approx(-1, abs=0.06)
    if world.difficulty == "constant":
        deviation = (law_F * (1 - law_F) / N).sqrt()
        assert ((truth.frequency() - law_F).abs() < 0.02 * law_F + 4.5 * deviation).all()


def test_strengths_have_stated_mean_deviation_and_minimum(truth):
    values = truth.codes.values
    assert values.min() >= 0.1
    assert abs(values.mean() - 1) < 0.005 and abs(values.std() - 0.25) < 0.005


def test_too_few_features_for_mean_l0_raise_value_error():
    with pytest.raises(ValueError, match="cannot have a mean of 8"):
        ZipfWorld(n_features=15).frequencies()
