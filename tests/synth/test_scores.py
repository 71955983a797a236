"""Means and deviations of scores, and which differences count."""

import pytest

from saebench.synth.scores import Score, exceeds


def score(*values, l0=(8.0, 8.0, 8.0)):
    return Score(data="zipf", sae="topk", k=8, test_rows=1, values={"f1": list(values), "l0": list(l0)})


def test_mean_and_sample_deviation_over_seeds():
    assert score(1, 2, 3).mean("f1") == 2 and score(1, 2, 3).sd("f1") == 1
    assert score(1).sd("f1") == 0 and score(1, l0=[8]).n_seeds == 1


@pytest.mark.parametrize(
    ("a", "b", "counts"),
    [((4, 5, 6), (2, 3, 4), False), ((4.1, 5.1, 6.1), (2, 3, 4), True), ((2, 3, 4), (4.1, 5.1, 6.1), False)],
)
def test_difference_counts_if_it_exceeds_sum_of_deviations(a, b, counts):
    assert exceeds(score(*a), score(*b), "f1") is counts


@pytest.mark.parametrize(("l0", "at_k"), [(8.39, True), (8.41, False), (7.61, True), (7.59, False)])
def test_l0_within_five_percent_of_k_counts_as_equal(l0, at_k):
    assert score(1, l0=[l0, l0]).at_k is at_k
