"""Tables made from sorted runs equal those counted one by one from dense codes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.store import runs as runs_module
from saebench.store import schema
from saebench.store.corpus import Corpus
from saebench.store.examples import examples, random, top
from saebench.store.runs import Runs
from saebench.store.statistics import activation_statistics, histograms, token_statistics
from tests.store import reference
from tests.store.small_store import SmallCache


@st.composite
def worlds(draw: st.DrawFn):
    """A cache and dense codes over it: few different values, so that there are ties; some negative."""
    cache = SmallCache(draw(st.integers(0, 50)), n_contexts=draw(st.integers(1, 6)), text=draw(st.booleans()))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    d_sae = draw(st.integers(1, 9))
    values = rng.integers(draw(st.sampled_from([-3, 0])), 6, size=(cache.n_rows, d_sae)) / 4
    kept = rng.random((cache.n_rows, d_sae)) < rng.choice([0, 0.02, 0.3, 1.0], size=d_sae)
    return cache, np.where(kept, values, 0).astype(np.float32)


def write_runs(directory: Path, codes_NM: np.ndarray, batch: int) -> Runs:
    runs = Runs(directory, codes_NM.shape[1])
    for start in range(0, len(codes_NM), batch):
        row, latent = np.nonzero(codes_NM[start : start + batch])
        runs.add(latent, row + start, codes_NM[row + start, latent])
    runs.flush()
    return runs


@given(
    worlds(),
    st.integers(1, 40),
    st.integers(1, 60),
    st.integers(1, 80),
    st.integers(1, 6),
    st.integers(1, 30),
)
@settings(max_examples=120, deadline=None)
def test_tables_equal_brute_force(world, batch, run_size, group_size, n, size):
    cache, codes_NM = world
    corpus = Corpus(cache)
    rows = reference.feature_rows(codes_NM, cache)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs_module, "RUN_SIZE", run_size)
        runs = write_runs(Path(folder) / "runs", codes_NM, batch)
        seen = 0
        for acts in runs.groups(group_size):
            assert acts.first == seen
            seen += acts.n_latents
            assert len(acts.value_S) <= group_size or acts.n_latents == 1
            check_group(acts, corpus, cache, codes_NM, rows, n, size)
        assert seen == codes_NM.shape[1]


def check_group(acts, corpus, cache, codes_NM, rows, n, size):
    columns = activation_statistics(acts, corpus)
    hist = histograms(acts)
    tokens = None
    if corpus.has_text:
        tokens, token_columns = token_statistics(acts, corpus)
        columns |= token_columns
    shown = examples(acts, corpus, n=n, window=size, seed=3)
    for i in range(acts.n_latents):
        feature = acts.first + i
        row, column = rows[feature], codes_NM[:, feature]
        for name, values in columns.items():
            if isinstance(row[name], float):
                assert values[i] == pytest.approx(row[name], rel=1e-5, abs=1e-6), name
            else:
                assert values[i] == row[name], name
        at = np.flatnonzero(np.asarray(hist["feature"]) == feature)
        expected = reference.histogram(column)
        assert len(at) == (expected is not None)
        if expected:
            lo, hi, counts = expected
            assert (hist["lo"][at[0]], hist["hi"][at[0]]) == (np.float32(lo), np.float32(hi))
            assert hist["counts"][int(at[0])].as_py() == counts
        if tokens is not None:
            here = tokens["feature"] == feature
            for rank, one in enumerate(reference.token_rows(column, cache)[: schema.TOKENS_PER_FEATURE]):
                for name, value in one.items():
                    assert tokens[name][here][rank] == pytest.approx(value), name
        check_examples(shown, feature, column, codes_NM, cache, corpus, n, size)


def check_examples(shown, feature, column, codes_NM, cache, corpus, n, size):
    group = (shown["feature"] == feature) & (shown["grp"] == schema.GROUP_TOP)
    expected = reference.top_rows(column, cache, n)
    np.testing.assert_array_equal(shown["value"][group], column[expected])
    np.testing.assert_array_equal(shown["rank"][group], np.arange(len(expected)))
    for i, row in zip(np.flatnonzero(group), expected, strict=True):
        if corpus.has_text:
            for name, value in reference.window(feature, row, codes_NM, cache, size).items():
                seen = shown[name][int(i)]
                assert (seen.as_py() if hasattr(seen, "as_py") else seen) == value, name
        else:
            assert (shown["ctx"][i], shown["pos"][i]) == (row, 0)
    group = (shown["feature"] == feature) & (shown["grp"] == schema.GROUP_RANDOM)
    fired = np.flatnonzero(column)
    assert group.sum() == min(n, len(fired))
    places = {(int(c), int(p)) for c, p in zip(shown["ctx"][group], shown["pos"][group], strict=True)}
    assert len(places) == group.sum()
    if not corpus.has_text:
        assert {ctx for ctx, _ in places} <= set(fired.tolist())


def test_random_examples_are_uniform_and_do_not_depend_on_grouping(tmp_path):
    codes_NM = np.ones((200, 3), dtype=np.float32)
    runs = write_runs(tmp_path / "runs", codes_NM, 50)
    whole = runs.read(0, 3)
    hits = np.zeros(600)
    for seed in range(600):
        hits[random(whole, 10, seed)] += 1
    assert abs(hits.mean() - 30) < 1e-9
    assert 3 < hits.std() < 8  # binomial: sqrt(600 * 0.05 * 0.95) = 5.3
    chosen = whole.row_S[random(whole, 10, 0)].reshape(3, 10)
    alone = runs.read(1, 2)
    np.testing.assert_array_equal(alone.row_S[random(alone, 10, 0)], chosen[1])


def test_repeated_picks_of_one_latent_are_added_up(tmp_path):
    runs = Runs(tmp_path / "runs", 4)
    runs.add(np.array([2, 1, 2, 3, 3]), np.array([0, 0, 0, 1, 1]), np.array([1.0, 2.0, 0.5, 1.0, -1.0]))
    runs.flush()
    acts = runs.read(0, 4)
    assert acts.latent_S.tolist() == [1, 2]
    assert acts.value_S.tolist() == [2.0, 1.5]
    assert runs.counts_M.tolist() == [0, 1, 1, 0]


def test_top_of_many_equal_activations_goes_by_row(tmp_path):
    cache = SmallCache(text=False)
    runs = write_runs(tmp_path / "runs", np.ones((cache.n_rows, 2), dtype=np.float32), 7)
    acts = runs.read(0, 2)
    np.testing.assert_array_equal(acts.row_S[top(acts, Corpus(cache), 3)], [0, 1, 2, 0, 1, 2])
