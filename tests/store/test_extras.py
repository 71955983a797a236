"""Extras: publishing, checks, and when indexing again keeps or drops them."""

from __future__ import annotations

import json
import os

import numpy as np
import pandas as pd
import pytest

from saebench.core.errors import UserError
from saebench.store import check_store, open_store, publish
from saebench.store.database import insert
from saebench.store.extras import meta_of, publish_extra
from saebench.store.publish import BUILDING, generations, read_manifest
from saebench.store.schema import EFFECT, EXPLAINED, FEATURE, HIST
from tests.store.small_store import SmallCache, build_small_store, small_options, small_sae
from tests.store.test_generations import stop_at

SCORES = {3: 0.5, 4: 0.25, 9: 1.0}


def fill(connection):
    texts = [f"explains {feature}" for feature in SCORES]
    insert(
        connection,
        EXPLAINED,
        {"feature": list(SCORES), "explanation": texts, "explanation_score": list(SCORES.values())},
    )
    return {"made_by": "a test"}


def add(store, extra="explanations", build=fill):
    with open_store(store) as opened:
        return publish_extra(store, opened.sae, extra, build, made_from=opened.info())


def add_effects(store, value=1.0):
    row = {"feature": 4, "loss_effect": value, "loss_effect_n": 1, "loss_estimate_n": 1}
    columns = {name: [row.get(name, 0.5)] for name in EFFECT.names}
    add(store, "effects", lambda connection: insert(connection, EFFECT, columns))


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    store = build_small_store(tmp_path_factory.mktemp("extended") / "store")
    add(store)
    return store


def test_extra_columns_join_feature_table(extended):
    with open_store(extended) as store:
        assert "explained" in store.tables
        assert store.features().columns.tolist() == [*FEATURE.names, "explanation", "explanation_score"]
        assert store.feature(9)["explanation"] == "explains 9"
        assert store.feature(0)["explanation_score"] is None
        found = store.features(["feature", "explanation_score"], ranges={"explanation_score": (0.3, None)})
        assert found["feature"].tolist() == [3, 9]
        assert store.count_features(ranges={"explanation_score": (0.3, None)}) == 2
        found = store.features(["feature", "explanation"], order_by="explanation_score", descending=True)
        assert found["feature"].tolist()[:4] == [9, 3, 4, 0]
        assert found["explanation"].isna().sum() == 21
        assert store.neighbors_in_order(3, order_by="explanation_score", descending=True) == (9, 4)


@pytest.mark.parametrize("limit", [None, 7])
@pytest.mark.parametrize(
    "order_by", ["feature", "max_act", "explanation", "explanation_score", "loss_effect"]
)
def test_sorted_page_with_extra_columns_equals_pandas(extended, order_by, limit):
    with open_store(extended) as store:
        whole = store.features([*FEATURE.names, "explanation", "explanation_score", "loss_effect"])
        page = store.features(
            ["explanation", "feature", "loss_effect"],
            ranges={"feature": (2, 20)},
            order_by=order_by,
            descending=True,
            limit=limit,
            offset=1,
        )
    expected = whole[whole["feature"].between(2, 20)]
    expected = expected.sort_values([order_by, "feature"], ascending=[False, order_by != "feature"])
    expected = expected[["explanation", "feature", "loss_effect"]].iloc[1:][:limit].reset_index(drop=True)
    page, expected = (frame.astype(object).where(frame.notna(), None) for frame in (page, expected))
    pd.testing.assert_frame_equal(page, expected)
    assert list(page["loss_effect"]) == [None] * len(page)


def test_unknown_column_is_refused_with_extra(extended):
    with open_store(extended) as store, pytest.raises(UserError, match="did you mean explanation"):
        store.features(order_by="explanatio")


def test_corrupt_extra_is_found_by_check(extended, tmp_path):
    assert check_store(extended) == []
    store = build_small_store(tmp_path / "store")
    rows = {"feature": [7, 99], "explanation": ["x", None], "explanation_score": [0.5, np.nan]}
    add(store, build=lambda c: insert(c, EXPLAINED, rows))
    problems = {finding.problem.split(" (")[0] for finding in check_store(store)}
    assert problems == {
        "explained features are not latents of this SAE, in order, each once",
        "an explanation is shown without its text or its score",
    }
    [file] = read_manifest(store).saes[0].extras.values()
    data = bytearray((store / file.path).read_bytes())
    data[-5] ^= 1
    (store / file.path).write_bytes(data)
    [finding] = check_store(store)
    assert finding.where == file.path and "checksum" in finding.problem
    build_small_store(store)
    assert check_store(store) == []
    assert read_manifest(store).saes[0].extras == {}


def test_publishing_extra_changes_no_other_file(tmp_path):
    store = build_small_store(tmp_path / "store")
    build_small_store(store, name="other", seed=1)
    before = read_manifest(store)
    add(store)
    add_effects(store)
    add_effects(store, 2.0)
    after = read_manifest(store)
    assert after.generation == before.generation + 3
    assert after.sae("other") == before.sae("other")
    assert after.sae("small").file == before.sae("small").file
    assert after.texts == before.texts
    with open_store(store) as opened:
        assert opened.feature(4)["explanation_score"] == 0.25
        assert opened.feature(4)["loss_effect"] == 2.0
    with open_store(store, "other") as opened:
        assert "explanation" not in opened.feature(4)
        assert opened.features(["explanation"])["explanation"].isna().all()
    assert check_store(store) == []
    add_effects(store)
    assert len(list(store.rglob("effects-*"))) == 2  # the current one, and that of the generation before


def test_indexing_again_keeps_extra_only_for_same_activations(tmp_path):
    store = build_small_store(tmp_path / "store")
    add(store)
    build_small_store(store)
    with open_store(store) as opened:
        assert opened.feature(9)["explanation"] == "explains 9"
        reader = opened.info()
    build_small_store(store, seed=1)
    with open_store(store) as opened:
        assert "explained" not in opened.tables
    with pytest.raises(UserError, match="indexed again from other activations"):
        publish_extra(store, "small", "explanations", fill, made_from=reader)
    with pytest.raises(UserError, match="'smal' is not an SAE"):
        publish_extra(store, "smal", "explanations", fill, made_from=reader)
    assert not (store / BUILDING).exists()


def test_indexing_another_cache_drops_extra(tmp_path):
    from tests.store.small_store import build_store

    store = build_small_store(tmp_path / "store", text=False)
    add(store)
    build_store(store, small_sae(), SmallCache(1, text=False), small_options(), no_logits="no text")
    assert read_manifest(store).saes[0].extras == {}


@pytest.mark.parametrize(
    "step", ["write_json_atomic", "rename", "sync_directory", "second_manifest", "collect"]
)
def test_publishing_extra_interrupted_at_any_step_leaves_valid_store(tmp_path, monkeypatch, step):
    store = build_small_store(tmp_path / "store")
    add_effects(store)
    child = os.fork()
    if child == 0:  # pragma: no cover
        stop_at(monkeypatch, step)
        try:
            add(store)
        finally:
            os._exit(9)
    os.waitpid(child, 0)
    with open_store(store) as opened:
        assert opened.feature(4)["loss_effect"] == 1.0
        assert ("explained" in opened.tables) == (step == "collect")
    assert check_store(store) == []
    add(store)
    assert check_store(store) == []


def test_failing_extra_build_leaves_store_unchanged(tmp_path):
    store = build_small_store(tmp_path / "store")
    before = read_manifest(store)
    with pytest.raises(ZeroDivisionError):
        add(store, build=lambda connection: 1 / 0)
    assert read_manifest(store) == before
    assert not (store / BUILDING).exists()


def test_extra_records_its_origin(extended):
    [file] = read_manifest(extended).saes[0].extras.values()
    meta = meta_of(extended / file.path)
    assert meta["made_by"] == "a test"
    with open_store(extended) as store:
        assert meta["sae_hash"] == store.info()["sae_hash"]


def test_manifest_without_extras_opens(tmp_path):
    store = build_small_store(tmp_path / "store")
    for path in [store / "manifest.json", generations(store)[0] / "manifest.json"]:
        content = json.loads(path.read_text())
        for sae in content["saes"]:
            del sae["extras"]
        path.write_text(json.dumps(content))
    add(store)
    assert check_store(store) == []


def test_unknown_extra_of_later_version_is_kept(tmp_path, monkeypatch):
    from saebench.store import schema

    store = build_small_store(tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setitem(schema.EXTRA_TABLES, "later", {"hist": HIST})
        add(store, "later", lambda connection: None)
    with open_store(store) as opened:
        assert opened.count_features() == 24
    assert check_store(store) == []
    add(store)
    assert set(publish.read_manifest(store).saes[0].extras) == {"later", "explanations"}


def test_text_search_covers_explanations_and_labels(extended):
    with open_store(extended) as store:
        tokens = store.features()["top_token"]
        labels = {5: "Explains nothing", 6: "<b>"}
        everywhere = {"search": ("top_token", "explanation"), "labels": labels}
        for sought in ({"text": "EXPLAINS"}, {"regex": "(?i)explains"}):
            assert store.features(["feature"], **sought, **everywhere)["feature"].tolist() == [3, 4, 5, 9]
            assert store.count_features(**sought) == 0
        hits = store.features(["feature"], text="<b>", **everywhere)["feature"].tolist()
        assert hits == sorted({6} | {f for f, token in enumerate(tokens) if "<b>" in str(token)})
        assert store.neighbors_in_order(4, text="explains", **everywhere) == (3, 5)
        assert store.features(flags={"explained": True})["feature"].tolist() == [3, 4, 9]
        alive = set(store.features(flags={"dead": False})["feature"])
        assert store.count_features(flags={"explained": False, "dead": False}) == len(alive - set(SCORES))
        with pytest.raises(UserError, match="not text"):
            store.features(text="a", search=["density"])
