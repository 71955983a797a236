"""Tables computed from the sorted spill equal brute force over dense codes."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.store import coactivation, schema, sorted_spill
from saebench.store.coactivation import CoactivationCounter
from saebench.store.corpus import Corpus
from saebench.store.examples import deciles, examples, per_decile, random, top
from saebench.store.sorted_spill import SortedSpill
from saebench.store.statistics import activation_statistics, histograms, position_rows, quantile_rows
from saebench.store.tokens import TokenFeatures, label_rows, token_statistics
from tests.store import reference
from tests.store.small_store import SmallCache

TOKEN_COLUMNS = ("token", "n", "p_token_given_fire", "p_fire_given_token", "lift")


@st.composite
def worlds(draw: st.DrawFn):
    """A cache and dense codes over it: few different values, so that there are ties; some negative."""
    cache = SmallCache(draw(st.integers(0, 50)), n_contexts=draw(st.integers(1, 6)), text=draw(st.booleans()))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    d_sae = draw(st.integers(1, 9))
    values = rng.integers(draw(st.sampled_from([-3, 0])), 6, size=(cache.n_rows, d_sae)) / 4
    kept = rng.random((cache.n_rows, d_sae)) < rng.choice([0, 0.02, 0.3, 1.0], size=d_sae)
    return cache, np.where(kept, values, 0).astype(np.float32)


def write_runs(directory: Path, codes_NM: np.ndarray, batch: int) -> SortedSpill:
    runs = SortedSpill(directory, codes_NM.shape[1])
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
        patch.setattr(sorted_spill, "RUN_SIZE", run_size)
        runs = write_runs(Path(folder) / "runs", codes_NM, batch)
        seen, inverse = 0, TokenFeatures()
        together = CoactivationCounter(cache.n_rows, codes_NM.shape[1], runs.n_activations, 0)
        for acts in runs.groups(group_size, 4):
            assert acts.first == seen
            seen += acts.n_latents
            assert len(acts.value_S) <= group_size or acts.n_latents == 1
            check_group(acts, corpus, cache, codes_NM, rows, n, size, inverse)
            together.add(acts)
        assert seen == codes_NM.shape[1]
        check_together(together, codes_NM)
        if corpus.has_text:
            check_inverse(inverse.rows(), codes_NM, cache)


def check_together(together, codes_NM):
    """Each latent's neighbors are the best of all pairs, with the right scores and counts."""
    pairs, rows = reference.together(codes_NM), together.rows(4)
    for latent in range(codes_NM.shape[1]):
        mine = {other: found for (a, other), found in pairs.items() if a == latent}
        for kind, place in ((schema.NEIGHBOR_KINDS["cofire"], 1), (schema.NEIGHBOR_KINDS["correlation"], 2)):
            at = (rows["feature"] == latent) & (rows["kind"] == kind)
            assert rows["rank"][at].tolist() == list(range(min(4, len(mine))))
            assert rows["n_both"][at].tolist() == [mine[other][0] for other in rows["other"][at]]
            if any(found[place] is None for found in mine.values()):
                continue  # a latent that is the same everywhere correlates with nothing
            expected = sorted((found[place] for found in mine.values()), reverse=True)[:4]
            np.testing.assert_allclose(rows["score"][at], expected, atol=1e-5)
            shown = [mine[other][place] for other in rows["other"][at]]
            np.testing.assert_allclose(rows["score"][at], shown, atol=1e-5)


def check_inverse(rows, codes_NM, cache):
    by_token = {}
    for feature, column in enumerate(codes_NM.T):
        for one in reference.token_rows(column, cache):
            evidence = np.float32(one["n"] * np.log(one["lift"]))
            by_token.setdefault(one["token"], []).append((-evidence, feature, one["n"], one["lift"]))
    assert rows["token"].tolist() == [token for token in sorted(by_token) for _ in by_token[token]]
    for token, expected in by_token.items():
        at = rows["token"] == token
        assert rows["rank"][at].tolist() == list(range(len(expected)))
        shown = dict(zip(rows["feature"][at].tolist(), rows["n"][at].tolist(), strict=True))
        assert shown == {feature: n for _, feature, n, _ in expected}
        evidence = rows["n"][at] * np.log(rows["lift"][at])
        np.testing.assert_allclose(-evidence, [one[0] for one in sorted(expected)], rtol=1e-5, atol=1e-5)


def check_group(acts, corpus, cache, codes_NM, rows, n, size, inverse):
    columns = activation_statistics(acts, corpus)
    hist, quantiles = histograms(acts), quantile_rows(acts)
    tokens = None
    if corpus.has_text:
        tokens, token_columns = token_statistics(acts, corpus, inverse)
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
        check_distribution(hist, quantiles, feature, column)
        if tokens is not None:
            for role in schema.TOKEN_ROLES.values():
                here = (tokens["feature"] == feature) & (tokens["role"] == role)
                expected = reference.token_rows(column, cache, role)[: schema.TOKENS_PER_FEATURE]
                assert tokens["rank"][here].tolist() == list(range(len(expected)))
                of_rows = TOKEN_COLUMNS if role == 0 else TOKEN_COLUMNS[:3]
                for name in of_rows:
                    wanted = [one[name] for one in expected]
                    assert tokens[name][here].tolist() == pytest.approx(wanted), name
            check_profile(acts, corpus, cache, feature, column)
        check_examples(shown, feature, column, codes_NM, cache, corpus, n, size)


def check_distribution(hist, quantiles, feature, column):
    fired = column[column != 0]
    of_feature = np.asarray(hist["feature"]) == feature
    kinds = np.asarray(hist["kind"])
    expected = {0: reference.histogram(column) if len(fired) else None}
    positive = np.log10(fired[fired > 0])
    expected[1] = (positive.min(), positive.max(), None) if len(positive) else None
    for kind, wanted in expected.items():
        at = np.flatnonzero(of_feature & (kinds == kind))
        assert len(at) == (wanted is not None)
        if wanted:
            lo, hi, counts = wanted
            assert (hist["lo"][at[0]], hist["hi"][at[0]]) == (np.float32(lo), np.float32(hi))
            shown = hist["counts"][int(at[0])].as_py()
            assert shown == counts if counts else sum(shown) == len(positive)
    at = np.flatnonzero(np.asarray(quantiles["feature"]) == feature)
    assert len(at) == (len(fired) > 0)
    if len(fired):
        wanted = np.quantile(fired.astype(np.float64), schema.QUANTILE_GRID)
        assert quantiles["qs"][int(at[0])].as_py() == pytest.approx(wanted.tolist(), rel=1e-6)


def check_profile(acts, corpus, cache, feature, column):
    """Positions and labels of a feature's firings."""
    fired, profile, labels = np.flatnonzero(column), position_rows(acts, corpus), label_rows(acts, corpus)
    at = np.flatnonzero(np.asarray(profile["feature"]) == feature)
    assert len(at) == (len(fired) > 0)
    if len(fired):
        bucket = cache.pos.numpy()[fired] * corpus.n_buckets // corpus.ctx_len
        assert profile["counts"][int(at[0])].as_py() == np.bincount(bucket, minlength=16).tolist()
    counted = Counter(cache.doc_labels()[doc] for doc in cache.doc.numpy()[fired])
    here = labels["feature"] == feature
    shown = [label for label, one in zip(labels["label"], here, strict=True) if one]
    assert labels["n"][here].tolist() == sorted(counted.values(), reverse=True)
    assert {label: int(n) for label, n in zip(shown, labels["n"][here], strict=True)} == counted


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
    check_deciles(shown, feature, column, corpus, n)
    check_silent(shown, feature, column, cache, n, size)


def rows_of(shown, group, corpus):
    place = shown["ctx"][group].astype(np.int64) * max(corpus.ctx_len, 1) + shown["pos"][group]
    return np.searchsorted(corpus.place(np.arange(corpus.n_rows)), place)


def check_deciles(shown, feature, column, corpus, n):
    """Each decile of the firings has the expected number of examples, and the weights add up."""
    fired = np.flatnonzero(column)
    ranked = fired[np.lexsort((fired, column[fired]))]
    total = 0.0
    for decile in schema.DECILES:
        group = (shown["feature"] == feature) & (shown["grp"] == decile)
        firings = [row for rank, row in enumerate(ranked) if rank * 10 // len(ranked) + 1 == decile]
        rows = rows_of(shown, group, corpus)
        assert len(set(rows)) == len(rows) == min(per_decile(n), len(firings))
        assert set(rows) <= set(firings)
        weights = [shown["weight"][int(i)].as_py() for i in np.flatnonzero(group)]
        assert sum(weights) == len(firings)
        total += sum(weights)
    assert total == len(fired)


def check_silent(shown, feature, column, cache, n, size):
    """Negatives: no activation in the window; the near misses are on a token that it fires on."""
    for grp in (schema.GROUP_NEAR_MISS, schema.GROUP_NEGATIVE):
        group = np.flatnonzero((shown["feature"] == feature) & (shown["grp"] == grp))
        assert len(group) <= n
        places = {(int(shown["ctx"][i]), int(shown["pos"][i])) for i in group}
        assert len(places) == len(group)
        for ctx, pos in places:
            if cache.ctx is None:
                assert grp == schema.GROUP_NEGATIVE
                assert column[ctx] == 0
                continue
            row = int(np.flatnonzero((cache.ctx.numpy() == ctx) & (cache.pos.numpy() == pos))[0])
            codes_NM = np.repeat(column[:, None], feature + 1, axis=1)
            assert not any(reference.window(feature, row, codes_NM, cache, size)["acts"])
            if grp == schema.GROUP_NEAR_MISS:
                assert int(cache.tokens[row]) in cache.tokens.numpy()[column != 0]


def test_random_examples_are_uniform_and_independent_of_groups(tmp_path):
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


def test_repeated_entries_of_a_latent_are_summed(tmp_path):
    runs = SortedSpill(tmp_path / "runs", 4)
    runs.add(np.array([2, 1, 2, 3, 3]), np.array([0, 0, 0, 1, 1]), np.array([1.0, 2.0, 0.5, 1.0, -1.0]))
    runs.flush()
    acts = runs.read(0, 4)
    assert acts.latent_S.tolist() == [1, 2]
    assert acts.value_S.tolist() == [2.0, 1.5]
    assert runs.counts_M.tolist() == [0, 1, 1, 0]


def test_top_examples_break_ties_by_row(tmp_path):
    cache = SmallCache(text=False)
    runs = write_runs(tmp_path / "runs", np.ones((cache.n_rows, 2), dtype=np.float32), 7)
    acts = runs.read(0, 2)
    np.testing.assert_array_equal(acts.row_S[top(acts, Corpus(cache), 3)], [0, 1, 2, 0, 1, 2])


def test_weighted_decile_examples_estimate_the_mean(tmp_path):
    values = np.random.default_rng(0).lognormal(size=500).astype(np.float32)
    acts = write_runs(tmp_path / "runs", values[:, None], 100).read(0, 1)
    estimates = []
    for seed in range(300):
        _, at, size = deciles(acts, 2, seed)
        estimates.append((acts.value_S[at] * size).sum() / size.sum())
    error = np.mean(estimates) - values.mean()
    assert abs(error) < 4 * np.std(estimates) / np.sqrt(300)
    assert np.std(estimates) < 0.7 * values.std() / np.sqrt(20)  # better than twenty drawn from the whole


def test_rare_latent_has_all_negatives(tmp_path):
    """A latent that fires on few occurrences of its tokens has the requested number of near misses."""
    cache = SmallCache(n_contexts=200)
    codes_NM = np.zeros((cache.n_rows, 1), dtype=np.float32)
    codes_NM[np.flatnonzero(cache.tokens.numpy() == 5)[:3]] = 1
    acts = write_runs(tmp_path / "runs", codes_NM, 500).read(0, 1)
    shown = examples(acts, Corpus(cache), n=6, window=5, seed=0)
    assert (shown["grp"] == schema.GROUP_NEAR_MISS).sum() == 6
    assert (shown["grp"] == schema.GROUP_NEGATIVE).sum() == 6


def test_large_store_samples_tokens_for_coactivation(tmp_path, monkeypatch):
    codes_NM = (np.random.default_rng(0).random((4000, 6)) < 0.5).astype(np.float32)
    runs = write_runs(tmp_path / "runs", codes_NM, 1000)
    monkeypatch.setattr(coactivation, "MOST_PAIRS", 1000 * 9)
    together = CoactivationCounter(4000, 6, runs.n_activations, 0)
    for acts in runs.groups(3000, 100):
        together.add(acts)
    assert 900 < together.n_tokens < 1100
    rows = together.rows()
    cofire = rows["kind"] == schema.NEIGHBOR_KINDS["cofire"]
    assert (abs(rows["score"][cofire] - 1 / 3) < 0.08).all()
    assert (rows["n_both"] <= together.n_tokens).all()
