"""rebuild_store gives identical tables, and converts a store of format 1."""

from __future__ import annotations

import json

import duckdb
import pytest

from saebench.core.errors import UserError
from saebench.store import check_store, open_store, publish, rebuild_store, tables
from tests.store.small_store import (
    SmallCache,
    build_small_store,
    build_store,
    small_options,
    small_sae,
    small_unembedding,
)
from tests.store.test_resume import rows_of


@pytest.mark.parametrize("group", [50, 4000])
def test_rebuild_gives_identical_rows(tmp_path, monkeypatch, group):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 0.5, "l0": 4}\n{"step": 2, "loss": 0.25}\n{"st')
    store = tmp_path / "store"
    build_store(
        store, small_sae(), SmallCache(), small_options(context_index=True), W_U_DV=small_unembedding(),
        metrics=metrics,
    )  # fmt: skip
    build_small_store(store, name="other", seed=1)
    before = rows_of(store)
    monkeypatch.setattr(tables, "GROUP_SIZE", group)
    assert rebuild_store(store, quiet=True).generation == 4
    assert rows_of(store) == before
    assert check_store(store) == []
    with open_store(store) as opened:
        assert opened.train_metrics().values.tolist() == [[1, "l0", 4], [1, "loss", 0.5], [2, "loss", 0.25]]


def test_rebuild_without_text_gives_equal_answers(tmp_path):
    store = build_small_store(tmp_path / "store", text=False)
    with open_store(store) as opened:
        before, examples = opened.features(), opened.examples(3)
    rebuild_store(store, quiet=True)
    with open_store(store) as opened:
        assert opened.features().equals(before)
        assert opened.examples(3).equals(examples)
    assert check_store(store) == []


OLDER = (
    *(f"DROP TABLE {name}" for name in ("quantile", "position", "token_feature", "feature_label")),
    *(
        f"ALTER TABLE feature DROP COLUMN {name}"
        for name in (
            "skew", "kurtosis", "p10", "p25", "p75", "top_token_p_fire", "mean_pos", "first_pos_share",
            "logit_max", "logit_kurtosis", "enc_norm", "b_enc",
        )
    ),
    "CREATE TABLE near AS SELECT feature, rank, other, score AS cosine FROM neighbor WHERE kind = 0",
    "DROP TABLE neighbor",
    "ALTER TABLE near RENAME TO neighbor",
    "UPDATE meta SET value = '1' WHERE key = 'format_version'",
    "DELETE FROM meta WHERE key IN ('left_out', 'ctx_len', 'pair_tokens', 'position_rows')",
    "DELETE FROM hist WHERE kind = 1",
    "ALTER TABLE hist DROP COLUMN kind",
    "DELETE FROM feature_token WHERE role <> 0",
    "ALTER TABLE feature_token DROP COLUMN role",
)  # fmt: skip
OLDER_TEXT = (
    "ALTER TABLE context DROP COLUMN kept",
    "UPDATE meta SET value = '1' WHERE key = 'format_version'",
)


def make_older(store):
    """Convert a store to format 1, in place."""
    manifest = json.loads((store / "manifest.json").read_text())
    files = [(sae["file"], OLDER) for sae in manifest["saes"]]
    files += [(file, OLDER_TEXT) for file in manifest["texts"].values()]
    for file, statements in files:
        path = store / file["path"]
        with duckdb.connect(str(path)) as connection:
            for statement in statements:
                connection.execute(statement)
            connection.execute("CHECKPOINT")
        described = publish.describe(path)
        file |= {"bytes": described.bytes, "sha256": described.sha256}
    for path in store.rglob("manifest.json"):
        path.write_text(json.dumps(manifest | {"format_version": 1}))


def test_rebuild_converts_format_1(tmp_path):
    store = build_small_store(tmp_path / "store")
    with open_store(store) as opened:
        before, tokens, examples = opened.features(), opened.tokens(3, "next"), opened.examples(3)
    make_older(store)
    with pytest.raises(UserError, match=r"has format 1 .*run saebench store rebuild"):
        open_store(store)
    rebuild_store(store, quiet=True)
    assert check_store(store) == []
    with open_store(store) as opened:
        unknown = ["enc_norm", "b_enc", "logit_kurtosis"]
        assert opened.features(unknown).isna().all().all()
        assert opened.features().drop(columns=unknown).equals(before.drop(columns=unknown))
        assert opened.tokens(3, "next").equals(tokens)
        assert opened.examples(3).equals(examples)
    build_small_store(store, name="other", seed=1)
    assert len(publish.read_manifest(store).texts) <= 2
    assert check_store(store) == []


def test_rebuild_of_ambiguous_old_text_is_refused(tmp_path):
    store = build_small_store(tmp_path / "store")
    file = next(store.rglob("text-*.duckdb"))
    with duckdb.connect(str(file)) as connection:
        connection.execute("UPDATE token SET n = n + 1 WHERE token = 4")
        connection.execute("UPDATE token SET n = n - 1 WHERE token = 5")
    make_older(store)
    before = (store / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="does not tell which tokens"):
        rebuild_store(store, quiet=True)
    assert (store / "manifest.json").read_bytes() == before
    assert not (store / publish.BUILDING).exists()


def test_rebuild_of_damaged_file_is_refused(tmp_path):
    store = build_small_store(tmp_path / "store")
    file = next(store.rglob("sae-*.duckdb"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="is damaged, so its tables cannot be computed again"):
        rebuild_store(store, quiet=True)
