"""Indexing that is killed at any time and resumed gives the tables of an uninterrupted run."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal

import duckdb
import pytest

from saebench.store import build, check_store, encode, open_store, publish, sorted_spill
from saebench.store.build import IndexJob, build_all
from saebench.store.encode import ENCODED, JOURNAL
from tests.store.small_store import SmallCache, small_options, small_sae, small_unembedding

RUN_SIZE, BATCH = 150, 13

KILLED_PROCESS = """
import os, signal
from saebench.core import files
from saebench.store import encode
from saebench.store import publish
from saebench.store import sorted_spill
from tests.store import test_resume

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def killed_at(name, real):
    def call(*args, **kwargs):
        plan[name] = plan.get(name, 0) + 1
        here = plan["where"] == name and plan[name] == plan["at"]
        if here and plan["before"]:
            kill()
        result = real(*args, **kwargs)
        if here:
            kill()
        return result
    return call

def torn(path, *args):
    with open(path, "wb") as file:
        file.write(b"half a run")
    kill()

encode._codes = killed_at("codes", encode._codes)
encode.Journal.append = killed_at("note", encode.Journal.append)
publish.write_json_atomic = killed_at("manifest", publish.write_json_atomic)
publish.os.rename = killed_at("rename", os.rename)
publish.collect = killed_at("collect", publish.collect)
if plan["where"] == "torn":
    real, plan["torn"] = sorted_spill._write, 0
    def write(path, *args):
        plan["torn"] += 1
        if plan["torn"] == plan["at"]:
            torn(path)
        return real(path, *args)
    sorted_spill._write = write
test_resume.index_two(store)
"""


def jobs():
    return [
        IndexJob(
            sae=small_sae(seed),
            options=small_options(name=f"sae{seed}", context_index=True),
            W_U_DV=small_unembedding(),
        )
        for seed in (0, 1)
    ]


def index_two(store):
    """Two SAEs in one pass, in steps of a few batches."""
    sorted_spill.RUN_SIZE = RUN_SIZE
    build_all(store, jobs(), SmallCache())


def killed(store, where, at, *, before=False):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["saebench.store.build", "saebench.saes.topk", "duckdb", "pyarrow.parquet"]
    )
    plan = {"where": where, "at": at, "before": before}
    process = context.Process(target=exec, args=(KILLED_PROCESS, {"store": store, "plan": plan}))
    process.start()
    process.join(60)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode == -signal.SIGKILL


def rows_of(store):
    """(SAE, table) -> all rows, of all files of the store."""
    found = {}
    manifest = publish.read_manifest(store)
    for sae in manifest.saes:
        for path in (sae.file.path, manifest.texts[sae.text].path):
            with duckdb.connect(str(store / path), read_only=True) as connection:
                for (table,) in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall():
                    found[sae.name, table] = connection.execute(f"FROM {table}").fetchall()
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorted_spill, "RUN_SIZE", RUN_SIZE)
        index_two(store)
    return rows_of(store)


@pytest.fixture
def counted(monkeypatch):
    """A list with one entry per batch that this process encodes."""
    calls = []
    real = encode._codes
    monkeypatch.setattr(encode, "_codes", lambda *args: calls.append(args) or real(*args))
    monkeypatch.setattr(sorted_spill, "RUN_SIZE", RUN_SIZE)
    return calls


PLANS = [
    ("torn", 2, False),  # between the files of one step
    ("note", 1, True),  # files of a step that the journal does not list
    ("note", 2, False),
    ("rename", 1, True),  # encoded, tables made, not yet a generation
    ("rename", 1, False),
    ("manifest", 2, True),  # a generation that is not published
    ("collect", 1, True),  # published, codes not yet cleared
]


@pytest.mark.parametrize(("where", "at", "before"), PLANS)
def test_resume_after_sigkill_gives_identical_rows(tmp_path, undisturbed, counted, where, at, before):
    store = tmp_path / "store"
    assert killed(store, where, at, before=before)
    with_journal = (store / ENCODED / JOURNAL).exists()
    steps = (store / ENCODED / JOURNAL).read_bytes().count(b"\n") - 1 if with_journal else 0
    index_two(store)
    batches = 2 * -(-SmallCache().n_rows // BATCH)
    assert len(counted) == batches if steps == 0 else len(counted) < batches
    assert rows_of(store) == undisturbed
    assert check_store(store) == []
    assert not (store / ENCODED).exists()
    assert not (store / publish.BUILDING).exists()


def test_resume_after_repeated_sigkill_gives_identical_rows(tmp_path, undisturbed, counted):
    store = tmp_path / "store"
    for where, at in (("codes", 3), ("note", 1), ("torn", 1), ("note", 2), ("rename", 1)):
        assert killed(store, where, at)
    index_two(store)
    assert rows_of(store) == undisturbed


@pytest.fixture(scope="module")
def half_encoded(tmp_path_factory):
    """A store directory after a kill between two steps."""
    store = tmp_path_factory.mktemp("half") / "store"
    assert killed(store, "note", 3)
    return store


@pytest.mark.parametrize("change", ["cache", "sae", "batch size"])
def test_codes_of_other_settings_are_not_reused(tmp_path, half_encoded, counted, change):
    store = shutil.copytree(half_encoded, tmp_path / "store")
    cache = SmallCache(5 if change == "cache" else 0)
    sae = small_sae(7 if change == "sae" else 0)
    options = small_options(batch_size=11 if change == "batch size" else BATCH)
    build_all(store, [IndexJob(sae=sae, options=options)], cache)
    assert len(counted) == -(-cache.n_rows // options.batch_size)
    assert check_store(store) == []
    with open_store(store) as opened:
        assert opened.saes == ["small"]


@pytest.mark.parametrize("damage", ["a byte", "a file", "a line", "the beginning"])
def test_damaged_codes_are_encoded_again(tmp_path, half_encoded, undisturbed, counted, damage):
    store = shutil.copytree(half_encoded, tmp_path / "store")
    encoded = store / ENCODED
    file, journal = encoded / "1" / "run-00001.parquet", encoded / JOURNAL
    if damage == "a byte":
        data = bytearray(file.read_bytes())
        data[60] ^= 1
        file.write_bytes(data)
    elif damage == "a file":
        file.unlink()
    elif damage == "a line":
        with open(journal, "ab") as opened:
            opened.write(b'{"rows": 99')
    else:
        journal.write_bytes(b"{" + journal.read_bytes())
    index_two(store)
    assert rows_of(store) == undisturbed


def test_nonfinite_codes_leave_no_files(tmp_path):
    cache = SmallCache()
    cache.activations()[50, 3] = float("nan")
    with pytest.raises(build.UserError, match="row 50"):
        build_all(tmp_path / "store", [IndexJob(sae=small_sae(), options=small_options())], cache)
    assert not (tmp_path / "store" / ENCODED).exists()


def test_journal_lists_files_of_each_step(half_encoded):
    lines = (half_encoded / ENCODED / JOURNAL).read_text().splitlines()
    first, *steps = [json.loads(line) for line in lines]
    assert set(first) == {"work"}
    assert [step["rows"] for step in steps] == sorted({step["rows"] for step in steps})
    for step in steps:
        assert [file["name"] for file in step["files"]] == [f"run-{steps.index(step):05d}.parquet"] * 2
