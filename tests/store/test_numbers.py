"""Feature specifications such as 3,17,40-49."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saebench.core.errors import UserError
from saebench.store.feature_spec import feature_numbers


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)).map(sorted), max_size=8))
def test_feature_spec_with_ranges_gives_all_features(spans):
    words = [f"{a}-{b}" if a != b else str(a) for a, b in spans]
    expected = dict.fromkeys(feature for a, b in spans for feature in range(a, b + 1))
    assert feature_numbers(words, 100) == feature_numbers([",".join(words)] * bool(words), 100) == [*expected]


@pytest.mark.parametrize("word", ["", "x", "3-", "-3", "5-4", "100", "7-100", "3 4", "1.5", "٣"])
def test_invalid_feature_spec_is_refused(word):
    with pytest.raises(UserError):
        feature_numbers([word], 100)
