from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saebench.core.errors import UserError
from saebench.store.intervals import Z_95, standard_error, wilson

counts = st.integers(1, 10**9).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))


@given(counts)
def test_wilson_bounds_solve_the_score_test(counted: tuple[int, int]) -> None:
    n, total = counted
    low, high = wilson(n, total)
    assert 0 <= low <= n / total <= high <= 1
    for end in {low, high} - {0.0, 1.0}:
        z = (n / total - end) / math.sqrt(end * (1 - end) / total)
        assert abs(z) == pytest.approx(Z_95, rel=1e-5)


@pytest.mark.parametrize(("n", "total"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_of_invalid_counts_is_refused(n: int, total: int) -> None:
    with pytest.raises(UserError, match="is not a fraction"):
        wilson(n, total)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_standard_error_equals_sample_formula(values: list[float]) -> None:
    import numpy as np

    found = standard_error(float(np.std(values)), len(values))
    assert found == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), abs=1e-9)
    assert standard_error(1.0, 1) is None
