"""Budgets by Zipf's law: exact sums, bounds, and recovery of laws from densities."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.saes.zipf import ZipfLaw, budgets_by_rank, fit_zipf, round_to_sum, share_out


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 300),
    cap=st.integers(1, 5000),
    law=st.builds(
        ZipfLaw,
        st.floats(0, 12) | st.floats(12, 1000),
        st.floats(0, 4096) | st.floats(4096, 1e308),
    ),
    data=st.data(),
)
def test_budgets_sum_exactly_within_floor_and_cap_and_fall_with_rank(n, cap, law, data):
    floor = data.draw(st.integers(0, min(cap, 3)))
    total = data.draw(st.integers(max(1, n * floor), n * cap))
    expected, whole = budgets_by_rank(law, n, total=total, floor=floor, cap=cap)
    assert int(whole.sum()) == total
    assert floor <= int(whole.min()) and int(whole.max()) <= cap
    assert (expected.diff() <= 0).all() and (whole - expected).abs().max() < 1
    assert (whole.diff() <= 0).all()


def test_between_the_bounds_shares_are_in_proportion():
    weights_M = torch.tensor([1000.0, 30.0, 20.0, 10.0, 0.01])
    shares_M = share_out(weights_M.double().log(), total=100, floor=1, cap=40)
    assert shares_M[0] == 40 and shares_M[4] == 1
    torch.testing.assert_close(shares_M[1:4], 59 * weights_M[1:4].double() / 60)


def test_the_worked_example_of_the_research_notes():
    """4,096 latents, k 32, 1,024 tokens, exponent 1: four columns full, none empty."""
    _, whole = budgets_by_rank(ZipfLaw(1.0, 0.0), 4096, total=32 * 1024, floor=1, cap=1024)
    assert (whole == 1024).sum() == 4 and whole.min() == 1 and whole.sum() == 32768


def test_the_largest_remainders_are_rounded_up_the_first_of_equal_ones():
    expected_M = torch.tensor([1.5, 2.25, 0.5, 0.75], dtype=torch.float64)
    assert round_to_sum(expected_M, 5).tolist() == [2, 2, 0, 1]


def test_impossible_sums_are_refused():
    for total in (4, 51):
        with pytest.raises(ValueError, match="between 1 and 10 cannot sum to"):
            share_out(torch.zeros(5), total=total, floor=1, cap=10)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(20, 400),
    exponent=st.floats(0.1, 3),
    shift=st.sampled_from([0.0, 1.0, 8.0]),
    by=st.sampled_from(["density", "rank"]),
)
def test_a_law_is_found_again_in_any_order(n, exponent, shift, by):
    density_M = 0.1 * ZipfLaw(exponent, shift).log_weights(n).exp()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    law = fit_zipf(density_M[order], by=by)
    assert law.shift == shift and abs(law.exponent - exponent) < 1e-6
    assert fit_zipf(density_M, exponent=exponent, by=by).shift == shift
    assert abs(fit_zipf(density_M, shift=shift, by=by).exponent - exponent) < 1e-6
    assert fit_zipf(density_M, exponent=0.7, shift=3.0) == ZipfLaw(0.7, 3.0)


def test_by_density_the_rare_end_does_not_bend_the_law():
    """A law whose rare half is cut off: the fit by rank follows the cut, that by density the matches."""
    density_M = ZipfLaw(1.0, 0.0).log_weights(2000).exp()
    density_M[1000:] *= 1e-3
    by_density, by_rank = (fit_zipf(density_M, shift=0.0, by=by).exponent for by in ("density", "rank"))
    assert abs(by_density - 1) < 0.2 and by_rank > 2


def test_a_shift_that_makes_all_ranks_one_fits_no_exponent():
    density_M = torch.linspace(0.1, 0.9, 50)
    assert fit_zipf(density_M, shift=1e308) == ZipfLaw(0.0, 1e308)
    assert fit_zipf(density_M, exponent=1000.0).exponent == 1000


def test_too_few_densities_leave_the_default():
    assert fit_zipf(torch.tensor([0.5, 0.1])) == ZipfLaw(1.0, 0.0)
    assert fit_zipf(torch.tensor([]), exponent=0.5, shift=2.0) == ZipfLaw(0.5, 2.0)
    assert fit_zipf(torch.full((9,), 0.25)).exponent == 0
