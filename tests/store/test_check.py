"""check_store finds each corruption that is planted in an intact store."""

from __future__ import annotations

import json
import shutil

import duckdb
import pytest

from saebench.core.errors import UserError
from saebench.store import check_store, open_store, publish, recompute, store_info
from saebench.store.logits import Unembedding
from tests.store.small_store import HOOK, SmallCache, build_small_store, small_sae, small_unembedding


def test_check_of_intact_store_finds_nothing(small_store, textless_store):
    assert check_store(small_store) == []
    assert check_store(textless_store) == []


def test_check_covers_several_saes(tmp_path):
    store = build_small_store(tmp_path / "store")
    build_small_store(store, name="other", seed=1)
    assert check_store(store) == []
    plant(store, "sae-", "UPDATE feature SET n_act = n_act + 1 WHERE feature = 3", number=1)
    findings = check_store(store)
    assert findings
    assert {finding.where for finding in findings} == {publish.read_manifest(store).sae("other").file.path}


def plant(store, kind: str, statement: str, number: int = 0) -> None:
    """Change a table and update the checksum in the manifest, as a faulty build would."""
    file = sorted(store.rglob(f"{kind}*.duckdb"))[number]
    old = publish.describe(file).sha256
    with duckdb.connect(str(file)) as connection:
        if "t.context" in statement:
            text = next(store.rglob("text-*.duckdb"))
            connection.execute(f"ATTACH '{text}' AS t (READ_ONLY)")
        before = connection.execute(statement).fetchall()
        assert before != [(0,)], "nothing was planted"
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
    "a neighbor is the latent itself": ("sae-", "UPDATE neighbor SET other = feature WHERE rank = 3"),
    "neighbors are out of order": ("sae-", "UPDATE neighbor SET score = 0.99 WHERE rank = 3"),
    "skew is wrong": ("sae-", "UPDATE feature SET skew = skew + 0.01 WHERE feature = 0"),
    "kurtosis is wrong": ("sae-", "UPDATE feature SET kurtosis = kurtosis + 0.01 WHERE feature = 0"),
    "a quantile of the lower half is wrong": ("sae-", "UPDATE feature SET p25 = p10 WHERE feature = 0"),
    "mean_pos is wrong": ("sae-", "UPDATE feature SET mean_pos = mean_pos + 0.01 WHERE feature = 0"),
    "first_pos_share is wrong": (
        "sae-", "UPDATE feature SET first_pos_share = first_pos_share + 0.01 WHERE feature = 0"),
    "top_token_p_fire is wrong": (
        "sae-", "UPDATE feature SET top_token_p_fire = top_token_p_fire / 2 WHERE feature = 0"),
    "logit_max is wrong": ("sae-", "UPDATE feature SET logit_max = logit_max + 1 WHERE feature = 0"),
    "a list of quantiles is wrong": (
        "sae-", "UPDATE quantile SET qs = list_transform(qs, lambda q: q * 1.001) WHERE feature = 0"),
    "a list of quantiles is missing": ("sae-", "DELETE FROM quantile WHERE feature = 0"),
    "a histogram of logarithms lost a count": (
        "sae-", "UPDATE hist SET counts = list_transform(counts, lambda n, i: CASE WHEN i = 1 THEN n + 1 "
        "ELSE n END) WHERE feature = 0 AND kind = 1"),
    "a histogram of logarithms is reversed": (
        "sae-", "UPDATE hist SET counts = list_reverse(counts) WHERE feature = 0 AND kind = 1"),
    "a histogram of logarithms is missing": ("sae-", "DELETE FROM hist WHERE feature = 0 AND kind = 1"),
    "a profile of positions is reversed": (
        "sae-", "UPDATE position SET counts = list_reverse(counts) WHERE feature = 0"),
    "a profile of positions is missing": ("sae-", "DELETE FROM position WHERE feature = 0"),
    "an example is in another decile": (
        "sae-", "UPDATE example SET grp = CASE grp WHEN 3 THEN 4 ELSE 3 END WHERE grp IN (3, 4) AND "
        "feature = 0"),
    "an example of a decile is missing": ("sae-", "DELETE FROM example WHERE grp = 7 AND feature = 0"),
    "an example's weight is wrong": (
        "sae-", "UPDATE example SET weight = weight + 1 WHERE grp = 5 AND feature = 0"),
    "a weight of random examples is wrong": (
        "sae-", "UPDATE example SET weight = weight * 1.1 WHERE grp = 20 AND feature = 0"),
    "a top example has a weight": ("sae-", f"UPDATE example SET weight = 1 WHERE {TOP}"),
    "an example is in the other fold": ("sae-", f"UPDATE example SET fold = 1 - fold WHERE {TOP}"),
    "all examples are in the other fold": ("sae-", "UPDATE example SET fold = 1 - fold"),
    "an example is in no fold": ("sae-", f"UPDATE example SET fold = NULL WHERE {TOP}"),
    "a firing passes for silence": (
        "sae-", "UPDATE example SET grp = 31 WHERE grp = 0 AND rank = 4 AND feature = 0"),
    "a near miss is on a token that it does not fire on": (
        "sae-", "UPDATE example SET ctx = e.ctx, pos = e.pos, doc = e.doc, fold = e.fold, start = e.start, "
        "tokens = e.tokens, acts = e.acts FROM example e JOIN t.context c ON c.ctx = e.ctx WHERE example.grp "
        "= 30 AND example.feature = e.feature AND e.grp = 31 AND c.tokens[e.pos + 1] NOT IN (SELECT token "
        "FROM feature_token f WHERE f.feature = e.feature AND role = 0)"),
    "a token before is wrong": (
        "sae-", "UPDATE feature_token SET n = n + 1 WHERE rank = 0 AND feature = 0 AND role = -1"),
    "a token after is missing": (
        "sae-", "DELETE FROM feature_token WHERE rank = 1 AND feature = 0 AND role = 1"),
    "a lift of a token before is wrong": (
        "sae-", "UPDATE feature_token SET lift = lift * 2 WHERE rank = 0 AND feature = 0 AND role = -1"),
    "a feature of a token is missing": (
        "sae-", "DELETE FROM token_feature WHERE token = 5 AND rank = (SELECT max(rank) FROM token_feature "
        "WHERE token = 5)"),
    "features of a token are out of order": (
        "sae-", "UPDATE token_feature SET rank = 1 - rank WHERE rank < 2 AND token = 5"),
    "a count of a token's feature is wrong": (
        "sae-", "UPDATE token_feature SET n = n + 1 WHERE rank = 0 AND token = 5"),
    "a label is missing": ("sae-", "DELETE FROM feature_label WHERE rank = 0 AND feature = 0"),
    "a count of a label is wrong": (
        "sae-", "UPDATE feature_label SET n = n + 1 WHERE rank = 0 AND feature = 0"),
    "a label is another one": (
        "sae-", "UPDATE feature_label SET label = o.label FROM feature_label o WHERE feature_label.feature = "
        "0 AND o.feature = 0 AND feature_label.rank = 0 AND o.rank = 1"),
    "a neighbor by direction is missing": (
        "sae-", "DELETE FROM neighbor WHERE kind = 1 AND rank = 15 AND feature = 0"),
    "two fire together more often than they do": (
        "sae-", "UPDATE neighbor SET n_both = n_both + 1 WHERE kind = 2 AND rank = 0 AND feature = 0"),
    "two are more alike than they are": (
        "sae-", "UPDATE neighbor SET score = score + 0.01 WHERE kind = 3 AND rank = 0 AND feature = 0"),
    "a token is not kept": (
        "text-", "UPDATE context SET kept = list_transform(kept, lambda k, i: k AND i <> 4) WHERE ctx = 0"),
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
def test_check_finds_planted_corruption(small_store, tmp_path, name):
    store = shutil.copytree(small_store, tmp_path / "store")
    plant(store, *PLANTED[name])
    findings = check_store(store)
    assert findings
    assert all(str(finding) for finding in findings)


@pytest.mark.parametrize("kind", ["sae-", "text-"])
@pytest.mark.parametrize("share", [0.0, 0.31, 0.7, 0.999])
def test_check_finds_flipped_byte(small_store, tmp_path, kind, share):
    store = shutil.copytree(small_store, tmp_path / "store")
    file = next(store.rglob(f"{kind}*.duckdb"))
    data = bytearray(file.read_bytes())
    data[int(share * len(data))] ^= 1
    file.write_bytes(data)
    assert [f.where for f in check_store(store)] == [str(file.relative_to(store))]


def test_check_finds_missing_and_truncated_files_and_wal(small_store, tmp_path):
    for number, damage in enumerate((
        lambda file: file.unlink(),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.with_name(file.name + ".wal").write_bytes(b""),
    )):  # fmt: skip
        store = shutil.copytree(small_store, tmp_path / f"store{number}")
        damage(next(store.rglob("text-*.duckdb")))
        assert len(check_store(store)) == 1


def test_check_without_store_raises_user_error(tmp_path):
    with pytest.raises(UserError, match="not a feature store"):
        check_store(tmp_path)


def test_store_info_has_generation_bytes_and_saes(small_store):
    info = store_info(small_store)
    assert info["generation"] == 1
    assert info["bytes"] == sum(file.stat().st_size for file in small_store.rglob("*.duckdb"))
    assert [sae["name"] for sae in info["saes"]] == ["small"]
    json.dumps(info)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """A folder with the run that was indexed and a run of another SAE."""
    folder = tmp_path_factory.mktemp("references")
    small_sae().save(folder / "run", hook_name=HOOK)
    small_sae(3).save(folder / "other", hook_name=HOOK)
    return folder


@pytest.fixture
def with_cache(monkeypatch):
    """open_cache returns the small cache, and find_unembedding the small unembedding."""
    import saebench.activations.cache as module

    monkeypatch.setattr(module, "open_cache", lambda path: SmallCache(5 if "other" in str(path) else 0))
    monkeypatch.setattr(
        recompute, "find_unembedding", lambda *_: (Unembedding(small_unembedding(), HOOK), "")
    )


def test_check_of_intact_store_against_references_finds_nothing(small_store, references, with_cache):
    assert check_store(small_store, run=references / "run") == []
    assert check_store(small_store, run=references / "run", cache="cache", model="cache") == []


CONSISTENT_CORRUPTIONS = {
    "directions are of another SAE": "UPDATE feature SET dec_norm = 2 * dec_norm WHERE feature = 3",
    "a bias is wrong": "UPDATE feature SET b_enc = b_enc + 1 WHERE feature = 3",
    "a cosine is wrong": "UPDATE feature SET enc_dec_cos = -enc_dec_cos",
    "neighbors are too near": "UPDATE neighbor SET score = score + (1 - score) * 0.2 WHERE kind = 1",
    "activations are half as large": "UPDATE act SET value = value / 2",
    "an activation was left out": "DELETE FROM act WHERE rowid = 7",
    "logits are half as large": "UPDATE logit SET value = value / 2",
    "the kurtosis of logits is wrong": "UPDATE feature SET logit_kurtosis = logit_kurtosis + 1",
}


@pytest.mark.parametrize("name", CONSISTENT_CORRUPTIONS)
def test_check_against_references_finds_consistent_corruption(
    small_store, references, with_cache, tmp_path, name
):
    store = shutil.copytree(small_store, tmp_path / "store")
    plant(store, "sae-", CONSISTENT_CORRUPTIONS[name])
    found = check_store(store, run=references / "run", cache="cache", model="cache")
    assert len(found) > len(check_store(store))


def test_check_against_other_references_is_refused(small_store, references, with_cache):
    with pytest.raises(UserError, match=r"those of no SAE of the store .* it has small"):
        check_store(small_store, run=references / "other")
    with pytest.raises(UserError, match="is not the one that the store was made from"):
        check_store(small_store, run=references / "run", cache="other")
    with pytest.raises(UserError, match="say which with --run"):
        check_store(small_store, cache="cache")
    with pytest.raises(UserError, match="say which with --cache"):
        check_store(small_store, run=references / "run", model="cache")


def test_check_names_unreadable_annotations(tmp_path):
    store = build_small_store(tmp_path / "store")
    with open_store(store) as opened:
        opened.annotations.set_label(1, "mine")
    assert check_store(store) == []
    (store / "user.sqlite").write_bytes(b"no database at all" * 100)
    [finding] = check_store(store)
    assert finding.where == "user.sqlite" and "cannot be read" in finding.problem
    assert (store / "user.sqlite").read_bytes().startswith(b"no database")
