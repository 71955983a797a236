from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.core.errors import UserError
from saebench.core.files import directory_lock
from saebench.store import build as build_module
from saebench.store import index, open_store, publish, schema, tables
from saebench.store.build import check_fit, forecast
from saebench.store.check import check_store
from saebench.store.corpus import Corpus
from saebench.store.settings import IndexConfig
from tests.store import reference
from tests.store.small_store import (
    D_SAE,
    HOOK,
    VOCAB,
    SmallCache,
    build_small_store,
    build_store,
    small_options,
    small_sae,
    small_unembedding,
)


@given(
    seed=st.integers(0, 99),
    contexts=st.integers(1, 8),
    d_sae=st.integers(1, 20),
    k=st.integers(1, 5),
    batch=st.integers(1, 200),
    group=st.integers(1, 400),
    text=st.booleans(),
)
@settings(max_examples=8, deadline=None)
def test_store_equals_brute_force(seed, contexts, d_sae, k, batch, group, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("store")
    cache = SmallCache(seed, n_contexts=contexts, text=text)
    sae = small_sae(seed, d_sae=d_sae, k=min(k, d_sae))
    options = small_options(batch_size=batch, examples=3, window=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "GROUP_SIZE", group)
        build_store(out, sae, cache, options, W_U_DV=small_unembedding() if text else None)
    with open_store(out) as store:
        compare(store, sae, cache)
    assert check_store(out) == []
    shutil.rmtree(out)


def compare(store, sae, cache):
    """Compare every answer of ``store`` with the dense codes."""
    codes_NM = np.zeros((cache.n_rows, sae.d_sae), dtype=np.float32)
    for feature in range(sae.d_sae):
        fired = store.activations(feature)
        rows = fired["ctx"].to_numpy()
        if cache.ctx is not None:
            place = cache.ctx.numpy().astype(np.int64) * 1000 + cache.pos.numpy()
            rows = np.searchsorted(place, fired["ctx"].to_numpy() * 1000 + fired["pos"].to_numpy())
        codes_NM[rows, feature] = fired["value"]
        assert (np.diff(rows) > 0).all()
    with torch.no_grad():
        expected = sae.encode(cache.activations()).to_dense().numpy()
    np.testing.assert_allclose(codes_NM, expected, rtol=1e-4, atol=1e-5)
    features = store.features()
    assert features["feature"].tolist() == list(range(sae.d_sae))
    near = reference.neighbors(sae.W_dec.detach().numpy(), schema.NEIGHBORS_PER_FEATURE)
    for row in reference.feature_rows(codes_NM, cache):
        feature = row["feature"]
        column, found = codes_NM[:, feature], store.feature(feature)
        for name, value in row.items():
            assert found[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), (
                name
            )
        histogram = store.histogram(feature)
        if row["n_act"]:
            lo, hi, counts = reference.histogram(column)
            assert histogram["count"].tolist() == counts
            assert (histogram["lo"].iloc[0], histogram["hi"].iloc[-1]) == pytest.approx((lo, hi))
        else:
            assert histogram.empty
        top = store.examples(feature, "top")
        assert top["value"].tolist() == column[reference.top_rows(column, cache, 3)].tolist()
        assert len(store.examples(feature, "random")) == min(3, row["n_act"])
        neighbors = store.neighbors(feature)
        np.testing.assert_allclose(neighbors["cosine"], near[feature][1], atol=1e-5)
        if not store.has("token"):
            assert top["tokens"].tolist() == [[]] * len(top)
            continue
        for _, example in top.iterrows():
            place = (cache.ctx.numpy() == example["ctx"]) & (cache.pos.numpy() == example["pos"])
            wanted = reference.window(feature, int(np.flatnonzero(place)[0]), codes_NM, cache, 7)
            assert {name: example[name] for name in wanted} == wanted
            joined = b"".join(VOCAB[token] for token in wanted["tokens"])
            assert "".join(example["pieces"]) == joined.decode("utf-8", "replace")
            assert example["label"] == cache.doc_labels()[wanted["doc"]]
        tokens = store.tokens(feature)
        assert tokens["n"].tolist() == [one["n"] for one in reference.token_rows(column, cache)]
        for name in ("token", "p_token_given_fire", "p_fire_given_token", "lift"):
            assert tokens[name].tolist() == pytest.approx(
                [o[name] for o in reference.token_rows(column, cache)]
            )
        logits = (sae.W_dec[feature] @ small_unembedding()).detach().numpy()
        shown = store.logits(feature)
        for sign in (1, -1):
            side = shown[shown["sign"] == sign]
            np.testing.assert_allclose(side["value"], sign * np.sort(sign * logits)[::-1][:10], rtol=1e-4)
            np.testing.assert_allclose(side["value"], logits[side["token"]], rtol=1e-4)


def test_second_sae_shares_text_file(tmp_path):
    store = build_small_store(tmp_path / "store")
    build_small_store(store, name="other", seed=1)
    with open_store(store) as first, open_store(store, "other") as second:
        assert first.sae == "small"
        assert first.saes == ["small", "other"]
        assert first.feature(1) != second.feature(1)
    assert len(list(store.rglob("text-*.duckdb"))) == 1


def test_indexing_again_replaces_only_same_name(tmp_path):
    store = build_small_store(tmp_path / "store")
    build_small_store(store, name="other", seed=1)
    with open_store(store, "other") as before:
        kept, reading = before.features(), open_store(store)
        old = reading.features()
        build_small_store(store, name="small", seed=2)
        assert reading.newer_generation() == 3
        assert reading.features().equals(old)
        reading.close()
    with open_store(store, "other") as after, open_store(store) as new:
        assert after.saes == ["small", "other"]
        assert after.features().equals(kept)
        assert not new.features()["max_act"].equals(old["max_act"])
        assert new.newer_generation() is None


def test_missing_tables_have_reasons(textless_store):
    with open_store(textless_store) as store:
        missing = store.info()["missing"]
        assert set(missing) == {*tables.NEED_TEXT, "logit"}
        assert not any(store.has(table) for table in missing)
        shown = store.examples(0)
        assert shown["pieces"].tolist() == [[f"unit {row}"] for row in shown["ctx"]]
        assert store.info()["n_contexts"] == 0
        for ask in (store.tokens, store.logits, store.context):
            with pytest.raises(UserError, match=r"has no table .* cache"):
                ask(0)


def test_missing_logits_have_a_reason(tmp_path):
    build_store(tmp_path / "s", small_sae(), SmallCache(), small_options(), no_logits="it was left out")
    with open_store(tmp_path / "s") as store:
        assert store.info()["missing"] == {"logit": "it was left out"}
        assert store.features()["logit_top"].isna().all()
        with pytest.raises(UserError, match="left out"):
            store.logits(0)
    assert check_store(tmp_path / "s") == []


def test_nonfinite_activations_are_refused_and_store_unchanged(tmp_path):
    store = build_small_store(tmp_path / "store")
    before = (store / "manifest.json").read_bytes()
    cache = SmallCache()
    cache.activations()[40, 3] = float("nan")
    with pytest.raises(UserError, match=r"row 40 of .* not finite"):
        build_store(store, small_sae(), cache, small_options(name="bad"))
    assert (store / "manifest.json").read_bytes() == before
    assert not (store / publish.BUILDING).exists()
    assert check_store(store) == []


def test_cache_of_other_d_in_is_refused():
    with pytest.raises(UserError, match=r"d_in 7 .* d_in 12"):
        check_fit(small_sae(d_in=7), SmallCache(), HOOK)


def test_unordered_rows_and_unknown_tokens_are_refused(tmp_path):
    cache = SmallCache()
    cache.pos[5] = cache.pos[4]
    with pytest.raises(UserError, match="order of their contexts"):
        Corpus(cache)
    cache = SmallCache()
    cache.tokens[7] = len(VOCAB)
    with pytest.raises(UserError, match="outside its vocabulary"):
        Corpus(cache)


def test_nonempty_directory_that_is_not_a_store_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"not a feature store .*thesis"):
        build_small_store(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_concurrent_writer_is_refused(tmp_path):
    with (
        directory_lock(tmp_path, what="the feature store"),
        pytest.raises(UserError, match="another process"),
    ):
        build_small_store(tmp_path)


def test_insufficient_disk_is_refused_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "forecast", lambda *args: 1 << 60)
    with pytest.raises(UserError, match=r"indexing .* needs"):
        build_small_store(tmp_path / "store")
    assert [path.name for path in (tmp_path / "store").iterdir()] == [".lock"]


def test_forecast_is_at_least_bytes_written(small_store):
    written = sum(path.stat().st_size for path in small_store.rglob("*.duckdb"))
    empty_files = 8 << 20  # DuckDB's blocks of 256 KiB, one or two for every column
    assert written < forecast(small_sae(), Corpus(SmallCache()), small_options()) + empty_files


def test_index_real_run_and_imported_cache(tmp_path, monkeypatch):
    from saebench.activations.importing import import_activations

    x = SmallCache().activations().numpy()
    np.save(tmp_path / "x.npy", x)
    import_activations(source=tmp_path / "x.npy", out=tmp_path / "cache", hook=HOOK, quiet=True)
    run = tmp_path / "run"
    small_sae().save(run, hook_name=HOOK)
    (run / "eval.json").write_text('{"explained_variance": 0.5}')
    config = IndexConfig(run=run, cache=tmp_path / "cache", out=tmp_path / "store", quiet=True, device="cpu")
    with index(config) as store:
        assert store.sae == "run"
        info = store.info()
        assert (info["d_sae"], info["n_tokens"], info["hook_name"]) == (D_SAE, len(x), HOOK)
        assert info["eval"] == {"explained_variance": 0.5}
        assert "context" in info["missing"]
        codes = small_sae().encode(torch.from_numpy(x)).to_dense().detach().numpy()
        assert store.features()["n_act"].tolist() == (codes != 0).sum(0).tolist()
    monkeypatch.setattr("saebench.store.build.find_unembedding", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match="not the manifest of a feature store"):
        index(replace(config, out=tmp_path / "cache"))
    small_sae().save(run, hook_name="blocks.9.hook_resid_post")
    with pytest.raises(UserError, match=r"blocks\.9.*pass --site"):
        index(config)


def test_index_several_runs_in_one_pass(tmp_path):
    from saebench.activations.importing import import_activations

    np.save(tmp_path / "x.npy", SmallCache().activations().numpy())
    import_activations(source=tmp_path / "x.npy", out=tmp_path / "cache", hook=HOOK, quiet=True)
    runs = [tmp_path / name for name in ("a", "b", "same")]
    for run, seed in zip(runs, (0, 1, 0), strict=True):
        small_sae(seed).save(run, hook_name=HOOK)
    (runs[1] / "metrics.jsonl").write_text('{"step": 3, "loss": 0.5}\n')
    config = IndexConfig(
        run=runs[0],
        also=tuple(runs[1:]),
        cache=tmp_path / "cache",
        out=tmp_path / "store",
        quiet=True,
        device="cpu",
        with_context_index=True,
    )
    with index(config) as first:
        assert (first.sae, first.saes, first.generation) == ("a", ["a", "b", "same"], 1)
        here = first.context_features(5)
        for feature, value in zip(here["feature"], here["value"], strict=True):
            fired = first.activations(feature).set_index("ctx")["value"]
            assert fired[5] == value
        with pytest.raises(UserError, match=r"no table 'train_metric' .*no metrics\.jsonl"):
            first.train_metrics()
        with open_store(tmp_path / "store", "same") as same:
            assert same.features().equals(first.features())
    with open_store(tmp_path / "store", "b") as second:
        assert second.train_metrics().values.tolist() == [[3, "loss", 0.5]]
    assert check_store(tmp_path / "store") == []
    with pytest.raises(UserError, match=r"two of the runs are called 'a'"):
        index(replace(config, also=(runs[0],)))
    with pytest.raises(UserError, match="several runs are named; leave it out"):
        replace(config, name="x")
