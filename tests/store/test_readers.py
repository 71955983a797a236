"""Many readers during publishing of new generations: no error, no lock left, constant memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from saebench.store import publish
from saebench.store.extras import publish_extra
from saebench.store.query import open_store
from tests.store.small_store import build_small_store

READERS = 10
GROWTH = (32 + 8 * (os.cpu_count() or 1)) * 2**20
"""Bytes by which a reader may grow over all its openings; one that is kept open by mistake takes more. DuckDB
has a thread for each core, and each keeps some."""

READER = """
import gc, json, random, sys, threading, time
from saebench.store.query import open_store
path, seconds, seed, n_threads = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
end, counts, errors, seen = time.monotonic() + seconds, [], [], set()

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def read(seed):
    rng, asked = random.Random(seed), 0
    while time.monotonic() < end or (3 not in seen and time.monotonic() < end + 60):
        try:
            with open_store(path) as store:
                seen.add(store.generation)
                for _ in range(20):
                    feature = rng.randrange(22)
                    row = store.feature(feature)
                    assert len(store.activations(feature)) == row["n_act"]
                    assert store.histogram(feature)["count"].sum() == row["n_act"]
                    store.examples(feature, "top")
                    store.features(order_by="max_act", descending=True, limit=5)
                    assert store.sql("SELECT count(*) AS n FROM feature")["n"][0] == 24
                    asked += 6
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
            return
    counts.append(asked)

with open_store(path) as store:
    store.features(), store.sql("SELECT 1 AS one"), store.examples(0)
before = resident()
threads = [threading.Thread(target=read, args=(seed * 100 + n,)) for n in range(n_threads)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
growth = resident() - before
print(json.dumps({"asked": sum(counts), "errors": errors, "seen": sorted(seen), "growth": growth}))
"""


@pytest.mark.parametrize("seconds", [10, pytest.param(60, marks=pytest.mark.slow)])
def test_readers_see_whole_generations_during_publishing(tmp_path: Path, seconds: int) -> None:
    path = build_small_store(tmp_path / "store")
    processes = 2
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, str(path), str(seconds), str(seed), str(READERS // processes)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(processes)
    ]
    time.sleep(seconds / 3)
    with open_store(path) as store:
        made_from = store.info()
    publish_extra(path, "small", "effects", lambda connection: None, made_from=made_from)
    time.sleep(seconds / 6)
    build_small_store(path, name="other", seed=1)
    for reader in readers:
        out, err = reader.communicate(timeout=seconds + 120)
        assert reader.returncode == 0, err
        found = json.loads(out)
        print(found)
        assert found["errors"] == []
        assert found["asked"] > 0
        assert found["growth"] < GROWTH, found
        assert found["seen"] == sorted(set(found["seen"])) != []
        assert found["seen"][-1] == 3
    # Nothing is held any more: the next generations clear all but the one before them away.
    for _ in range(2):
        with open_store(path) as store:
            made_from = store.info()
        publish_extra(path, "small", "effects", lambda connection: None, made_from=made_from)
    manifest = publish.read_manifest(path)
    assert manifest.generation == 5
    kept = {file.path for file in manifest.files()} | {
        file.path for file in publish.parse_manifest(path / "gen-000004" / publish.MANIFEST).files()
    }
    on_disk = {str(file.relative_to(path)) for file in path.glob("gen-*/*.duckdb")}
    assert on_disk == kept
    assert not list(path.rglob("*.wal"))
