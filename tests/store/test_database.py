"""DuckDB connections of readers are locked, and damaged or newer files raise a UserError."""

from __future__ import annotations

import json
import subprocess
import sys

import duckdb
import numpy as np
import pytest

from saebench.core.errors import UserError
from saebench.store import check_store, open_store, publish, schema
from saebench.store.database import insert, new_database, open_reader
from tests.store.small_store import build_small_store


@pytest.fixture
def reader(small_store):
    manifest = publish.read_manifest(small_store)
    connection = open_reader(*(small_store / file.path for file in manifest.files()))
    yield connection
    connection.close()


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM read_csv('/etc/passwd')",
        "COPY sae.feature TO 'stolen.csv'",
        "ATTACH 'other.duckdb'",
        "INSERT INTO sae.feature SELECT * FROM sae.feature",
        "DROP TABLE sae.act",
        "SET enable_external_access = true",
        "SET threads = 64",
        "INSTALL httpfs",
        "LOAD httpfs",
    ],
)
def test_reader_connection_cannot_write_or_open_files(reader, query, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(duckdb.Error):
        reader.execute(query)
    assert list(tmp_path.iterdir()) == []


def test_late_materialization_is_disabled(tmp_path):
    """With its defaults, DuckDB joins the table with itself for a top n, and fails on one of these queries.

    When an assertion about the defaults fails, the setting can be removed.
    """
    file = tmp_path / "trap.duckdb"
    n = 300_000
    columns = {"feature": np.zeros(n, int), "ctx": np.arange(n), "pos": np.zeros(n, int), "value": np.ones(n)}
    with new_database(file, [schema.ACT]) as connection:
        insert(connection, schema.ACT, columns)
    top = "SELECT * FROM {}.act WHERE feature = 0 ORDER BY value DESC LIMIT 3"
    some = "SELECT * FROM {}.act WHERE rowid BETWEEN 5 AND 9 ORDER BY value DESC LIMIT 3"
    with duckdb.connect(str(file), read_only=True) as plain:
        assert "join" in plain.execute("EXPLAIN " + top.format("trap")).fetchall()[0][1].lower()
        with pytest.raises(duckdb.InternalException):
            plain.execute(some.format("trap"))
    with open_reader(file) as reader:
        assert "join" not in reader.execute("EXPLAIN " + top.format("sae")).fetchall()[0][1].lower()
        assert len(reader.execute(some.format("sae")).fetchall()) == 3


def test_full_disk_raises_user_error_and_leaves_no_store(tmp_path, monkeypatch):
    store = build_small_store(tmp_path / "store")
    before = (store / "manifest.json").read_bytes()

    def full(*args, **kwargs):
        raise duckdb.IOException('Could not write file "x": No space left on device')

    monkeypatch.setattr("saebench.store.tables.insert", full)
    with pytest.raises(UserError, match="no space left while writing"):
        build_small_store(store, name="second")
    assert (store / "manifest.json").read_bytes() == before
    assert not (store / publish.BUILDING).exists()


LIMITED = """
import resource, sys
from saebench.core.errors import UserError
from tests.store.small_store import build_small_store
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    build_small_store(sys.argv[1], name="second", seed=1)
except UserError as error:
    sys.exit("sentence: " + str(error))
"""


@pytest.mark.parametrize("limit", [2_000, 300_000, 1_000_000])
def test_real_file_size_limit_raises_user_error(tmp_path, limit):
    store = build_small_store(tmp_path / "store")
    before = (store / "manifest.json").read_bytes()
    command = [sys.executable, "-c", LIMITED, str(store), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.startswith("sentence: no space left while writing"), done.stderr
    assert (store / "manifest.json").read_bytes() == before
    assert check_store(store) == []
    assert not (store / publish.BUILDING).exists()


def test_newer_format_raises_user_error(tmp_path):
    store = build_small_store(tmp_path / "store")
    content = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps(content | {"format_version": 3}))
    for use in (open_store, build_small_store):
        with pytest.raises(UserError, match=r"has format 3 and this saebench reads up to 2; install"):
            use(store)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 1}', "null", '"x"', "\\xff"])
def test_damaged_manifest_raises_user_error(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json is (not|damaged)"):
        open_store(tmp_path)


@pytest.mark.parametrize("key", ["generation", "saes", "texts"])
def test_manifest_without_a_key_raises_user_error(tmp_path, key):
    store = build_small_store(tmp_path / "store")
    content = json.loads((store / "manifest.json").read_text())
    del content[key]
    (store / "manifest.json").write_text(json.dumps(content))
    copy = store / "gen-000001" / "manifest.json"
    with pytest.raises(UserError, match=rf"damaged .*copy {copy} over it"):
        open_store(store)
    (store / "manifest.json").write_bytes(copy.read_bytes())
    open_store(store).close()


@pytest.mark.parametrize("kept", [0, 100, 5000, 0.5, 0.99])
def test_truncated_file_raises_user_error(tmp_path, kept):
    store = build_small_store(tmp_path / "store")
    file = next(store.rglob("sae-*.duckdb"))
    data = file.read_bytes()
    file.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    with pytest.raises(UserError, match="bytes where its manifest says"):
        open_store(store)


def test_damaged_blocks_raise_user_error(tmp_path):
    """With bytes overwritten in the whole file, each query is answered or raises a UserError."""
    store = build_small_store(tmp_path / "store")
    file = next(store.rglob("sae-*.duckdb"))
    data = bytearray(file.read_bytes())
    for at in range(12_288, len(data), 4096):
        data[at] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"cannot be read|damaged"):
        ask_everything(store)


def ask_everything(store):
    with open_store(store) as opened:
        for feature in range(24):
            opened.examples(feature)
            opened.activations(feature)


def test_missing_file_is_named_in_error(tmp_path):
    store = build_small_store(tmp_path / "store")
    file = next(store.rglob("text-*.duckdb"))
    file.unlink()
    with pytest.raises(UserError, match=rf"{file.name} is missing"):
        open_store(store)


HOLDER = """
import sys, duckdb
connection = duckdb.connect(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def test_file_open_for_writing_is_named_in_error(tmp_path):
    store = build_small_store(tmp_path / "store")
    file = next(store.rglob("sae-*.duckdb"))
    command = [sys.executable, "-c", HOLDER, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"{file.name} is open for writing in another program"):
            open_store(store)
        holder.stdin.close()
    open_store(store).close()
