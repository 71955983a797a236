"""Comparison of several SAEs of one store."""

from __future__ import annotations

import pytest

from saebench.core.errors import UserError
from saebench.store import open_store
from tests.store.small_store import (
    D_SAE,
    K,
    SmallCache,
    build_small_store,
    build_store,
    small_options,
    small_sae,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = build_small_store(tmp_path_factory.mktemp("several") / "store")
    build_small_store(path, name="second", seed=1)
    other_text = SmallCache(seed=5)
    build_store(path, small_sae(2), other_text, small_options(name="third"), no_logits="none were asked for")
    with open_store(path, "second") as opened:
        yield opened


def places(store, feature):
    acts = store.activations(feature)
    return set(zip(acts["ctx"], acts["pos"], strict=True))


def test_compare_has_summary_of_each_sae(store):
    table = store.compare()
    assert table["name"].tolist() == ["small", "second", "third"]
    for row in table.itertuples():
        with store.beside(row.name) as opened:
            assert opened.generation == store.generation
            features = opened.features()
            assert row.dead == features["dead"].mean()
            assert row.dense == features["dense"].mean()
            assert row.median_density == features["density"][~features["dead"]].median()
            assert row.l0 == pytest.approx(K) == opened.info()["n_activations"] / row.n_tokens
    assert table["explained_variance"][0] == 0.5
    assert table["explained_variance"].isna().tolist() == [False, False, True]


@pytest.mark.parametrize("other", ["small", "second"])
def test_cross_sae_coactivation_equals_sets(store, other):
    with store.beside(other) as opened:
        theirs = {i: places(opened, i) for i in range(D_SAE)}
    for feature in range(0, D_SAE, 3):
        own = places(store, feature)
        found = store.same_firings(feature, other, limit=99)
        wanted = {i: len(own & firings) for i, firings in theirs.items() if own & firings}
        assert dict(zip(found["feature"], found["n_both"], strict=True)) == wanted
        for row in found.itertuples():
            assert row.p_other_given_this == pytest.approx(row.n_both / len(own))
            assert row.p_this_given_other == pytest.approx(row.n_both / len(theirs[row.feature]))
            assert row.jaccard == pytest.approx(row.n_both / len(own | theirs[row.feature]))
        assert found["jaccard"].is_monotonic_decreasing
        if other == "second" and own:
            assert (found["feature"][0], found["jaccard"][0]) == (feature, 1)


def test_incomparable_saes_raise_user_error(store):
    with pytest.raises(UserError, match="'second' and 'third' were indexed over other text"):
        store.same_firings(0, "third")
    with pytest.raises(UserError, match="did you mean small"):
        store.same_firings(0, "smal")
    with pytest.raises(UserError, match="feature 99"):
        store.same_firings(99, "small")
    with pytest.raises(UserError, match="did you mean third"):
        store.beside("thirt")


def test_cross_sae_without_text_compares_rows(textless_store, tmp_path):
    path = build_small_store(tmp_path / "store", text=False)
    build_store(path, small_sae(1), SmallCache(text=False), small_options(name="same"), no_logits="none")
    build_store(path, small_sae(1), SmallCache(3, text=False), small_options(name="else"), no_logits="none")
    with open_store(path) as store:
        assert len(store.same_firings(0, "same"))
        with pytest.raises(UserError, match="indexed over other text"):
            store.same_firings(0, "else")
