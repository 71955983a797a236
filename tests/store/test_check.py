"""Corruptions are planted in a sound store; the check finds each of them."""

from __future__ import annotations

import json
import shutil

import duckdb
import pytest

from saebench.errors import UserError
from saebench.store import check_store, publish, store_info
from tests.store.small_store import build_small_store


def test_a_sound_store_has_no_findings(small_store, textless_store):
    assert check_store(small_store) == []
    assert check_store(textless_store) == []


def test_several_saes_are_checked(tmp_path):
    store = build_small_store(tmp_path / "store")
    build_small_store(store, name="other", seed=1)
    assert check_store(store) == []
    plant(store, "sae-", "UPDATE feature SET n_act = n_act + 1 WHERE feature = 3", number=1)
    findings = check_store(store)
    assert findings
    assert {finding.where for finding in findings} == {publish.read_manifest(store).sae("other").file.path}


def plant(store, kind: str, statement: str, number: int = 0) -> None:
    """Change a table behind the store's back and make the manifest agree, as a wrong builder would."""
    file = sorted(store.rglob(f"{kind}*.duckdb"))[number]
    old = publish.describe(file).sha256
    with duckdb.connect(str(file)) as connection:
        connection.execute(statement)
        connection.execute("CHECKPOINT")
    new = publish.describe(file)
    for manifest in store.rglob("manifest.json"):
        content = json.loads(manifest.read_text())
        for stored in [*(sae["file"] for sae in content["saes"]), *content["texts"].values()]:
            if stored["sha256"] == old:
                stored |= {"sha256": new.sha256, "bytes": new.bytes}
        manifest.write_text(json.dumps(content))


TOP = "grp = 0 AND rank = 1 AND feature = 0"
PLANTED = {
    "a feature is missing": ("sae-", "DELETE FROM feature WHERE feature = 5"),
    "a feature is there twice": ("sae-", "INSERT INTO feature SELECT * FROM feature WHERE feature = 5"),
    "n_act is wrong": ("sae-", "UPDATE feature SET n_act = n_act + 1 WHERE feature = 0"),
    "density is wrong": ("sae-", "UPDATE feature SET density = density * 1.0001 WHERE feature = 0"),
    "dead is wrong": ("sae-", "UPDATE feature SET dead = NOT dead WHERE feature = 0"),
    "dense is wrong": ("sae-", "UPDATE feature SET dense = NOT dense WHERE feature = 0"),
    "max_act is wrong": ("sae-", "UPDATE feature SET max_act = max_act * 1.001 WHERE feature = 0"),
    "mean_act is wrong": ("sae-", "UPDATE feature SET mean_act = mean_act * 1.001 WHERE feature = 0"),
    "std_act is wrong": ("sae-", "UPDATE feature SET std_act = std_act * 1.01 WHERE feature = 0"),
    "a quantile is wrong": ("sae-", "UPDATE feature SET p90 = p90 * 1.001 WHERE feature = 0"),
    "n_ctx_act is wrong": ("sae-", "UPDATE feature SET n_ctx_act = n_ctx_act - 1 WHERE feature = 0"),
    "n_doc_act is wrong": ("sae-", "UPDATE feature SET n_doc_act = n_doc_act - 1 WHERE feature = 0"),
    "top_token is wrong": ("sae-", "UPDATE feature SET top_token = 'x' WHERE feature = 0"),
    "logit_top is wrong": ("sae-", "UPDATE feature SET logit_top = 'x' WHERE feature = 0"),
    "dec_nn is wrong": ("sae-", "UPDATE feature SET dec_nn = (dec_nn + 1) % 24 WHERE feature = 0"),
    "an activation is gone": ("sae-", "DELETE FROM act WHERE rowid = 7"),
    "an activation is there twice": ("sae-", "INSERT INTO act SELECT * FROM act WHERE rowid = 7"),
    "an activation is zero": ("sae-", "UPDATE act SET value = 0 WHERE rowid = 7"),
    "an activation is not a number": ("sae-", "UPDATE act SET value = 'nan' WHERE rowid = 7"),
    "an activation has another value": ("sae-", "UPDATE act SET value = value * 0.9 WHERE rowid = 7"),
    "activations are out of order": (
        "sae-", "CREATE TABLE copy AS FROM act; DELETE FROM act; INSERT INTO act FROM copy ORDER BY value; "
        "DROP TABLE copy"),
    "an activation lies beyond its context": ("sae-", "UPDATE act SET pos = 99 WHERE rowid = 7"),
    "a histogram lost a count": (
        "sae-", "UPDATE hist SET counts = list_transform(counts, lambda n, i: CASE WHEN i = 1 THEN n + 1 "
        "ELSE n END) WHERE feature = 0"),
    "a histogram is reversed": ("sae-", "UPDATE hist SET counts = list_reverse(counts) WHERE feature = 0"),
    "a histogram is missing": ("sae-", "DELETE FROM hist WHERE feature = 0"),
    "an example has another value": ("sae-", f"UPDATE example SET value = value + 1 WHERE {TOP}"),
    "an example is somewhere else": ("sae-", f"UPDATE example SET pos = pos + 1 WHERE {TOP}"),
    "an example's window shows other tokens": (
        "sae-", f"UPDATE example SET tokens = list_transform(tokens, lambda t: (t + 1) % 30) WHERE {TOP}"),
    "an example's window is shifted": ("sae-", f"UPDATE example SET start = start + 1 WHERE {TOP}"),
    "an example's window has other activations": (
        "sae-", f"UPDATE example SET acts = list_transform(acts, lambda a: a * 1.5) WHERE {TOP}"),
    "an example's document is wrong": ("sae-", f"UPDATE example SET doc = (doc + 1) % 4 WHERE {TOP}"),
    "a top example was left out": ("sae-", f"DELETE FROM example WHERE {TOP}"),
    "top examples are in another order": ("sae-", "UPDATE example SET rank = 9 - rank WHERE grp = 0"),
    "a random example is missing": (
        "sae-", "DELETE FROM example WHERE grp = 20 AND rank = 0 AND feature = 0"),
    "a random example is there twice": (
        "sae-", "UPDATE example SET ctx = o.ctx, pos = o.pos, value = o.value, doc = o.doc, start = o.start, "
        "tokens = o.tokens, acts = o.acts FROM example o WHERE example.feature = 0 AND o.feature = 0 "
        "AND example.grp = 20 AND o.grp = 20 AND example.rank = 1 AND o.rank = 0"),
    "a token count is wrong": ("sae-", "UPDATE feature_token SET n = n + 1 WHERE rank = 0 AND feature = 0"),
    "a token is missing": ("sae-", "DELETE FROM feature_token WHERE rank = 1 AND feature = 0"),
    "a share of a token is wrong": (
        "sae-", "UPDATE feature_token SET p_token_given_fire = 0.5 WHERE rank = 1"),
    "a lift is wrong": ("sae-", "UPDATE feature_token SET lift = lift * 2 WHERE rank = 0 AND feature = 0"),
    "a logit is not a number": ("sae-", "UPDATE logit SET value = 'nan' WHERE rank = 3 AND feature = 2"),
    "logits are out of order": ("sae-", "UPDATE logit SET value = value + 9 WHERE rank = 3 AND sign = 1"),
    "a logit names no token": ("sae-", "UPDATE logit SET token = 999 WHERE rank = 3 AND feature = 2"),
    "a neighbour is the latent itself": ("sae-", "UPDATE neighbor SET other = feature WHERE rank = 3"),
    "neighbours are out of order": ("sae-", "UPDATE neighbor SET score = 0.99 WHERE rank = 3"),
    "a table is gone": ("sae-", "DROP TABLE hist"),
    "a column is gone": ("sae-", "ALTER TABLE feature DROP COLUMN p99"),
    "the file is of another SAE": ("sae-", "UPDATE meta SET value = '\"x\"' WHERE key = 'name'"),
    "the number of activations is wrong": ("sae-", "UPDATE meta SET value = '1' WHERE key = 'n_activations'"),
    "a meta entry is gone": ("sae-", "DELETE FROM meta WHERE key = 'd_sae'"),
    "a context has another token": (
        "text-", "UPDATE context SET tokens = list_transform(tokens, lambda t: (t + 1) % 30) WHERE ctx = 0"),
    "a context has a token that is none": (
        "text-", "UPDATE context SET tokens = list_transform(tokens, lambda t: t + 100) WHERE ctx = 0"),
    "a context is gone": ("text-", "DELETE FROM context WHERE ctx = 9"),
    "a context has another length": ("text-", "UPDATE context SET n_tokens = 2 WHERE ctx = 0"),
    "a context's documents are wrong": (
        "text-", "UPDATE context SET docs = list_transform(docs, lambda d: d + 9) WHERE ctx = 0"),
    "a token is out of order": ("text-", "UPDATE token SET token = 99 WHERE token = 4"),
    "an occurrence of a token is wrong": ("text-", "UPDATE token SET n = n + 1 WHERE token = 4"),
    "the text is another one": ("text-", "UPDATE meta SET value = '\"x\"' WHERE key = 'text_hash'"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_corruption_is_found(small_store, tmp_path, name):
    store = shutil.copytree(small_store, tmp_path / "store")
    plant(store, *PLANTED[name])
    findings = check_store(store)
    assert findings
    assert all(str(finding) for finding in findings)


@pytest.mark.parametrize("kind", ["sae-", "text-"])
@pytest.mark.parametrize("share", [0.0, 0.31, 0.7, 0.999])
def test_a_flipped_byte_is_found(small_store, tmp_path, kind, share):
    store = shutil.copytree(small_store, tmp_path / "store")
    file = next(store.rglob(f"{kind}*.duckdb"))
    data = bytearray(file.read_bytes())
    data[int(share * len(data))] ^= 1
    file.write_bytes(data)
    assert [f.where for f in check_store(store)] == [str(file.relative_to(store))]


def test_missing_and_cut_files_and_logs_are_found(small_store, tmp_path):
    for number, damage in enumerate((
        lambda file: file.unlink(),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.with_name(file.name + ".wal").write_bytes(b""),
    )):  # fmt: skip
        store = shutil.copytree(small_store, tmp_path / f"store{number}")
        damage(next(store.rglob("text-*.duckdb")))
        assert len(check_store(store)) == 1


def test_no_store_is_an_error(tmp_path):
    with pytest.raises(UserError, match="not a feature store"):
        check_store(tmp_path)


def test_store_info(small_store):
    info = store_info(small_store)
    assert info["generation"] == 1
    assert info["bytes"] == sum(file.stat().st_size for file in small_store.rglob("*.duckdb"))
    assert [sae["name"] for sae in info["saes"]] == ["small"]
    json.dumps(info)
