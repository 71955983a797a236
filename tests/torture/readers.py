"""Readers of a store that is published again and again by processes that are killed, and hostile SQL.

Every generation has its own number in all rows of one table. What a reader is given, through Python and
through the process that answers SQL, must be the number of the generation that it opened. Hostile SQL must
end within its limits of time and memory, with rows or one sentence, and leave no process behind.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

from saebench.core.errors import UserError
from saebench.store import open_store, sql_pool
from saebench.store.publish import read_manifest
from saebench.store.sql_process import SPARE_BYTES
from tests.store.small_store import build_small_store
from tests.torture.outcome import Outcome

READERS = 10
QUERY_SECONDS = 1.0
GRACE_SECONDS = 20.0
"""To start a process and to end it, on a busy machine."""
BASE_BYTES = 512 * 2**20
"""Resident memory of a process without a query, at most."""

PUBLISHER = """
import sys
from saebench.store import open_store
from saebench.store.extras import publish_extra

def publish(path):
    with open_store(path) as store:
        info, number = store.info(), store.generation + 1

    def fill(connection):
        connection.execute(
            "INSERT INTO effect SELECT range, ?, 0, 1, 0, 1 FROM range(?)", [number, info["d_sae"]]
        )

    publish_extra(store.path, store.sae, "effects", fill, made_from=info)

publish(sys.argv[1])  # which imports what it needs
print("ready", flush=True)
for _ in range(int(sys.argv[2]) - 1):
    publish(sys.argv[1])
"""

READER = """
import json, sys, time
from saebench.store import open_store

path, end, said = sys.argv[1], time.monotonic() + float(sys.argv[2]), {"reads": 0, "failures": []}
seen = set()
while time.monotonic() < end:
    try:
        with open_store(path) as store:
            number = store.generation
            store.time_limit = 60
            for _ in range(3):
                rows = store.sql("SELECT min(loss_effect) AS a, max(loss_effect) AS b, count(*) AS n FROM effect")
                found = {*rows["a"], *rows["b"], *store.features(["feature", "loss_effect"])["loss_effect"]}
                if found != {number} or rows["n"][0] != 24:
                    said["failures"].append(f"generation {number} gave {sorted(found)}, {rows['n'][0]} rows")
                said["reads"] += 2
            seen.add(number)
    except Exception as error:
        said["failures"].append(f"{type(error).__name__}: {error}")
print(json.dumps(said | {"generations": len(seen)}))
"""  # noqa: E501


def run(folder: Path, seed: int, seconds: float) -> Outcome:
    """Readers with publishers for half of the time, hostile SQL for the rest."""
    outcome = Outcome("readers during publishing, and hostile SQL", "answer")
    read_while_published(folder, seed, seconds / 2, outcome)
    ask_hostile(folder, seed, seconds / 2, outcome)
    return outcome


def read_while_published(
    folder: Path, seed: int, seconds: float, outcome: Outcome, *, readers: int = READERS
) -> None:
    rng, path = random.Random(seed), build_small_store(folder / "store")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    publisher = [sys.executable, "-c", PUBLISHER, str(path)]
    subprocess.run([*publisher, "1"], check=True, env=environment)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", READER, str(path), str(seconds)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for _ in range(readers)
    ]  # fmt: skip
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        process = subprocess.Popen(
            [*publisher, "1000000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
        assert process.stdout is not None
        process.stdout.readline()
        try:
            _, error = process.communicate(timeout=rng.uniform(0.05, 2))
            outcome.failures.append(f"seed {seed}: the publisher ended: {error.decode()[-300:]}")
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            outcome.count("publishers killed")
    for reader in running:
        try:
            out, err = reader.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            reader.kill()
            outcome.failures.append(f"seed {seed}: a reader did not end")
            continue
        if reader.returncode:
            outcome.failures.append(f"seed {seed}: a reader ended with {reader.returncode}: {err[-300:]}")
            continue
        said = json.loads(out)
        outcome.attempts += said["reads"]
        outcome.failures += [f"seed {seed}: {failure}" for failure in said["failures"]]
    outcome.count("generations", read_manifest(path).generation)


def ask_hostile(folder: Path, seed: int, seconds: float, outcome: Outcome) -> None:
    """Ask for expressions of `hostile_query` until the time is over."""
    rng = random.Random(seed)
    path = folder / "store"
    if not path.exists():
        build_small_store(path)
    watched, end = _Watch(), time.monotonic() + seconds
    with open_store(path) as store, watched:
        store.time_limit = QUERY_SECONDS
        while time.monotonic() < end:
            query, began = hostile_query(rng), time.monotonic()
            try:
                store.sql(query, limit=rng.choice([1, 1000, 10_000]))
                outcome.count("answered")
            except UserError as error:
                outcome.count("stopped or refused")
                if "\n" in str(error) or len(str(error)) > 5000:
                    outcome.failures.append(f"seed {seed}: {query[:200]!r} gave {str(error)[:200]!r}")
            except Exception as error:
                outcome.failures.append(f"seed {seed}: {query[:300]!r} gave {type(error).__name__} {error}")
            outcome.attempts += 1
            took = time.monotonic() - began
            if took > QUERY_SECONDS + GRACE_SECONDS:
                outcome.failures.append(f"seed {seed}: {query[:300]!r} took {took:.1f} s")
            if watched.peak > BASE_BYTES + SPARE_BYTES:
                outcome.failures.append(f"seed {seed}: {query[:300]!r} had {watched.peak >> 20} MiB")
            watched.peak = 0
    sql_pool._kill_all()
    if left := _children():
        outcome.failures.append(f"seed {seed}: processes {left} are left")


class _Watch:
    """The largest resident memory of the processes that answer SQL."""

    def __init__(self) -> None:
        self.peak, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.02):
            for child in _children():
                try:
                    pages = int(Path(f"/proc/{child}/statm").read_text().split()[1])
                except (OSError, IndexError):
                    continue
                self.peak = max(self.peak, pages * os.sysconf("SC_PAGESIZE"))


def _children() -> list[int]:
    """The processes of this one that answer SQL; none where there is no /proc."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            words = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if int(parent) == os.getpid() and state != "Z" and b"saebench.store.sql_process" in words:
            found.append(int(folder.name))
    return found


def hostile_query(rng: random.Random) -> str:
    """A random query: mostly valid, often of huge values, rows or depth, sometimes of what is refused."""
    tables = ("feature", "act", "token", "context", f"range({_number(rng)})", "(VALUES (1), (NULL)) v(x)")
    kind = rng.randrange(12)
    if kind == 0:
        names = rng.choice(
            ["duckdb_settings()", "duckdb_databases", "glob('/*')", "read_text('/etc/passwd')"]
        )
        return f"SELECT {_text(rng, 1)} FROM {names}"
    if kind == 1:
        return (
            f"WITH RECURSIVE t(n, s) AS (SELECT 1, {_text(rng, 1)} UNION ALL "
            f"SELECT n + 1, s || {rng.choice(['s', 'n', _text(rng, 1)])} FROM t) FROM t"
        )
    if kind == 2:
        joined = ", ".join(f"{rng.choice(tables)} t{n}" for n in range(rng.randrange(2, 30)))
        return f"SELECT count(*), max(hash({_text(rng, 1)})) FROM {joined}"
    if kind == 3:
        depth = rng.choice([10, 500, 3000])
        left, right = rng.choice([("(", ")"), ("[", "]"), ("abs(", ")"), ("(SELECT ", ")"), ("{'a': ", "}")])
        return f"SELECT {left * depth}1{right * depth}"[:19_999]
    if kind == 4:
        return "".join(
            rng.choice("SELECT FROM*(),'\"\\;--/*\x00\x1b\u202e=1[]{}?$%") for _ in range(rng.randrange(200))
        )
    if kind == 5:
        summed = f"list_reduce(range({_number(rng)}), lambda a, b: a + b)"
        return f"SELECT {summed}, {_list(rng)} FROM {rng.choice(tables)}"
    select = ", ".join(rng.choice((_text, _list))(rng, 3) for _ in range(rng.randrange(1, 4)))
    tail = rng.choice(["", "", " ORDER BY ALL", " LIMIT 3"])
    return f"SELECT {select} FROM {rng.choice(tables)}{tail}"


def _number(rng: random.Random) -> str:
    return rng.choice(["0", "-1", "3", "1000", "1000000", "100000000", "2000000000", "9223372036854775807"])


def _text(rng: random.Random, depth: int = 2) -> str:
    if depth == 0:
        return rng.choice(["'a'", "'x=1'", "''", "NULL", "'\u202e'", "'é'"])
    inner, other, n = _text(rng, depth - 1), _text(rng, depth - 1), _number(rng)
    return rng.choice([
        f"repeat({inner}, {n})", f"replace({inner}, {other}, {inner})", f"lpad({inner}, {n}::INT, {other})",
        f"bitstring('1', {n}::INT)::VARCHAR", f"string_agg({inner}, {other})", f"printf('%{n}d', 1)",
        f"regexp_replace({inner}, '(a|b)*', {other}, 'g')",
        f"array_to_string({_list(rng, depth - 1)}, {other})",
        f"to_json({_list(rng, depth - 1)})", f"format('{{:>{n}}}', {inner})",
        f"levenshtein({inner}, {other})::VARCHAR",
        f"upper({inner}) || {other}", f"current_setting({inner})", f"md5({inner})", f"hex({inner})",
    ])  # fmt: skip


def _list(rng: random.Random, depth: int = 2) -> str:
    n = _number(rng)
    if depth == 0:
        return rng.choice(["[1, 2]", "range(3)", f"range({n})"])
    inner = _list(rng, depth - 1)
    return rng.choice([
        f"list_transform({inner}, lambda x: {inner})", f"list_resize({inner}, {n})", f"list_sort({inner})",
        f"list_concat({inner}, {inner})", f"generate_series(0, {n})", f"list({inner})",
        f"flatten([{inner}, {inner}])",
        f"list_aggregate({inner}, 'string_agg')", f"list_zip({inner}, {inner})",
        f"string_split({_text(rng, 1)}, '')",
    ])  # fmt: skip
