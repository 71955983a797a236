"""Generations of a store: a writer that is killed at any time leaves the old generation or the new one."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from saebench.core.errors import UserError
from saebench.store import check_store, open_store, publish, schema
from saebench.store.publish import BUILDING, collect, generations, hold, read_manifest
from tests.store.small_store import build_small_store

WRITER = """
import os, sys
import duckdb, pandas, pyarrow, saebench.store.examples, saebench.store.query
from tests.store.small_store import build_small_store
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        build_small_store(sys.argv[1], seed=int(line))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def folders(store):
    return [folder.name for folder in generations(store)]


def test_publish_removes_unused_old_generations(tmp_path):
    store = build_small_store(tmp_path / "store")
    text = next(store.rglob("text-*.duckdb"))
    for seed in range(1, 5):
        build_small_store(store, seed=seed)
    assert read_manifest(store).generation == 5
    assert folders(store) == ["gen-000001", "gen-000004", "gen-000005"]
    assert list((store / "gen-000001").iterdir()) == [text]
    assert check_store(store) == []


def test_generation_with_open_reader_is_kept(tmp_path):
    store = build_small_store(tmp_path / "store")
    reader = open_store(store)
    before = reader.features()
    for seed in range(1, 5):
        build_small_store(store, seed=seed)
    assert len(list((store / "gen-000001").glob("sae-*"))) == 1
    assert reader.features().equals(before)
    assert reader.newer_generation() == 5
    reader.close()
    build_small_store(store, seed=5)
    assert len(list((store / "gen-000001").glob("sae-*"))) == 0


def test_reader_of_deleted_store_detects_recreated_store(tmp_path):
    reader = open_store(build_small_store(tmp_path / "store"))
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(UserError, match="not a feature store"):
        reader.newer_generation()
    build_small_store(tmp_path / "store", seed=1)
    assert reader.newer_generation() == reader.generation == 1
    assert len(reader.features()) == 24


def test_indexing_again_repairs_damaged_files(tmp_path):
    store = build_small_store(tmp_path / "store")
    for file in store.rglob("*.duckdb"):
        data = bytearray(file.read_bytes())
        data[5000] ^= 1
        file.write_bytes(data)
    assert len(check_store(store)) == 2
    build_small_store(store)
    assert check_store(store) == []


def test_previous_generation_stays_intact(tmp_path):
    store = build_small_store(tmp_path / "store")
    build_small_store(store, seed=1)
    old = publish.parse_manifest(store / "gen-000001" / "manifest.json")
    for file in old.files():
        assert publish.sha256_file(store / file.path) == file.sha256


def test_unpublished_folder_is_removed_by_next_build(tmp_path):
    store = build_small_store(tmp_path / "store")
    (store / "gen-000002").mkdir()
    (store / "gen-000002" / "sae-x.duckdb").write_bytes(b"left by a build killed before it was published")
    (store / BUILDING).mkdir()
    (store / BUILDING / "runs").mkdir()
    assert check_store(store) == []
    build_small_store(store, seed=1)
    assert folders(store) == ["gen-000001", "gen-000002"]
    assert not (store / BUILDING).exists()
    assert check_store(store) == []


def test_store_without_manifest_is_refused_and_unchanged(tmp_path):
    store = build_small_store(tmp_path / "store")
    build_small_store(store, seed=1)
    before = {path: path.read_bytes() for path in store.rglob("gen-*/*")}
    (store / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"lost its manifest\.json; copy .*gen-000002/manifest\.json to"):
        open_store(store)
    with pytest.raises(UserError, match=r"lost its manifest\.json; copy .*gen-000002/manifest\.json to"):
        build_small_store(store, seed=2)
    assert {path: path.read_bytes() for path in store.rglob("gen-*/*")} == before
    shutil.copy(store / "gen-000002" / "manifest.json", store / "manifest.json")
    assert check_store(store) == []


@pytest.mark.parametrize(
    "path", ["../other/gen-000001/sae-x.duckdb", "/etc/passwd", "gen-000001/../x.duckdb"]
)
def test_manifest_with_path_outside_store_is_refused(tmp_path, path):
    store = build_small_store(tmp_path / "store")
    content = json.loads((store / "manifest.json").read_text())
    content["saes"][0]["file"]["path"] = path
    (store / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"path is .* should match pattern"):
        open_store(store)


def test_publish_interrupted_at_any_step_leaves_valid_store(tmp_path, monkeypatch):
    """After an interrupt at each step of publish, the store opens and a new build works."""
    for step in ("write_json_atomic", "rename", "sync_directory", "second_manifest", "collect"):
        store = build_small_store(tmp_path / step)
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(KeyboardInterrupt):
                build_small_store(store, seed=1)
        expected = 2 if step == "collect" else 1
        with open_store(store) as opened:
            assert opened.generation == expected
        assert check_store(store) == []
        build_small_store(store, seed=2)
        assert read_manifest(store).generation == expected + 1
        assert check_store(store) == []


def stop_at(patch, step: str) -> None:
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    if step == "second_manifest":
        real = publish.write_json_atomic
        patch.setattr(publish, "write_json_atomic", lambda p, v: real(p, v) if BUILDING in str(p) else stop())
    elif step == "rename":
        patch.setattr(publish.os, "rename", stop)
    else:
        patch.setattr(publish, step, stop)


def test_sigkill_at_random_times_leaves_valid_store(tmp_path):
    store = build_small_store(tmp_path / "store")
    started = time.perf_counter()
    build_small_store(store, seed=1)
    duration = time.perf_counter() - started
    generator = random.Random(0)
    command = [sys.executable, "-c", WRITER, str(store)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as writer:
        assert writer.stdin
        assert writer.stdout
        for attempt in range(10):
            generation = read_manifest(store).generation
            writer.stdin.write(b"%d\n" % (attempt % 3))
            writer.stdin.flush()
            child = int(writer.stdout.readline())
            time.sleep(generator.uniform(0, 1.2 * duration))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            assert int(writer.stdout.readline()) in (0, -signal.SIGKILL)
            after = read_manifest(store).generation
            assert after in (generation, generation + 1)
            assert check_store(store) == []
            with open_store(store) as opened:
                assert opened.generation == after
                assert opened.count_features() == 24
        writer.stdin.close()
    build_small_store(store, seed=7)
    assert not (store / BUILDING).exists()
    assert check_store(store) == []
    known = {file.path for file in read_manifest(store).files()}
    known |= {file.path for file in publish.parse_manifest(generations(store)[-2] / "manifest.json").files()}
    assert {str(file.relative_to(store)) for file in store.rglob("*.duckdb")} == known


def test_reader_with_stale_manifest_retries(tmp_path, monkeypatch):
    store = build_small_store(tmp_path / "store")
    stale = read_manifest(store)
    for seed in (1, 2, 3):
        build_small_store(store, seed=seed)
    real, answers = publish.read_manifest, iter([stale])
    monkeypatch.setattr(publish, "read_manifest", lambda path: next(answers, None) or real(path))
    with open_store(store) as opened:
        assert opened.generation == 4


def test_file_system_without_locks_still_opens_store(tmp_path, monkeypatch):
    store = build_small_store(tmp_path / "store")

    def refuse(*args):
        raise OSError("no locks here")

    monkeypatch.setattr(publish.fcntl, "flock", refuse)
    assert hold(store, read_manifest(store)) is None
    with open_store(store) as opened:
        assert opened.count_features() == 24
    collect(store, read_manifest(store))
    assert check_store(store) == []


def test_manifest_round_trips_and_has_format_version(small_store):
    content = json.loads((small_store / "manifest.json").read_text())
    assert content["format_version"] == schema.FORMAT_VERSION
    assert content["saes"][0]["file"]["path"].startswith("gen-000001/sae-")
    assert read_manifest(small_store).to_json() == json.loads(json.dumps(content)) | {
        "saes": tuple(content["saes"])
    }
