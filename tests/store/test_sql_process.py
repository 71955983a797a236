"""People's SQL runs in a process that the operating system limits; its functions read nothing outside."""

from __future__ import annotations

import datetime
import decimal
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from saebench.core.errors import UserError
from saebench.store import open_store, sql_pool, sql_process
from saebench.store.publish import read_manifest
from saebench.store.sql_process import SPARE_BYTES, Console
from saebench.store.sql_rules import SqlRules
from tests.store.small_store import build_small_store

SECRET = "kept-to-itself"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_store(tmp_path_factory.mktemp(SECRET) / "store")


def children(parent: int) -> list[int]:
    """The processes that ``parent`` started and that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, owner = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(owner) == parent and state != "Z":
            found.append(int(folder.name))
    return found


def test_functions_that_may_be_called_know_no_path_setting_or_variable(path: Path) -> None:
    file = read_manifest(path).saes[0].file
    console = Console()
    opening = {"store": str(path), "files": {"sae": (str(path / file.path), "")}, "search_path": "sae.main"}
    assert console.answer({"open": opening}, b"") == ({}, b"")
    connection = console._connection
    assert connection is not None
    samples = {
        "VARCHAR": ("'temp_directory'", "'sae'", "'HOME'", "'{}'"), "T": ("'HOME'",),
        "ANY": ("'memory_limit'", "1"), "INTERVAL": ("INTERVAL 1 DAY",), "TIMESTAMP": ("now()::TIMESTAMP",),
        "BIGINT": ("1",), "INTEGER": ("1",), "DOUBLE": ("1.0",), "BOOLEAN": ("true",), "JSON": ("'{}'",),
        "BLOB": ("'a'::BLOB",), "DATE": ("today()",),
        "T[]": ("['HOME']",), "ANY[]": ("['HOME']",), "VARCHAR[]": ("['HOME']",),
    }  # fmt: skip
    listed = (
        "SELECT DISTINCT lower(function_name), coalesce(parameter_types, []), coalesce(varargs, '') "
        "FROM duckdb_functions() WHERE function_type IN ('scalar', 'aggregate', 'macro')"
    )
    functions, outside = SqlRules.of(connection).functions, [SECRET, str(Path.home()), "1.0 GiB"]
    called, ran = 0, set[str]()
    for name, types, varargs in connection.execute(listed).fetchall():
        if name not in functions or not name.replace("_", "").isalnum():
            continue
        kinds = [str(kind or "ANY") for kind in types] + [varargs] * bool(varargs)
        for at in range(2):
            given = [samples.get(kind, (f"'1'::{kind}",)) for kind in kinds]
            words = ", ".join(choices[at % len(choices)] for choices in given)
            called += 1
            try:
                said = str(connection.cursor().execute(f"SELECT {name}({words})").fetchall())
            except Exception as error:
                said = str(error)
            else:
                ran.add(name)
            assert not [word for word in outside if word in said], (name, words, said)
    assert called > 1500
    assert len(ran) > 0.7 * len(functions)
    console.answer({"open": {"store": "", "files": {}, "search_path": ""}}, b"")


@pytest.mark.parametrize(
    "query",
    [
        "SELECT repeat('x', 3000000000)",
        "SELECT list_resize([1], 3000000000)",
        "SELECT string_agg(repeat('x', 1000), ',') FROM range(10000000)",
        "WITH RECURSIVE t(s) AS (SELECT 'a' UNION ALL SELECT s || s FROM t) SELECT max(length(s)) FROM t",
        "SELECT list_reduce(range(200), lambda a, b: a || a) FROM (SELECT 1)",
        "SELECT damerau_levenshtein(repeat('a', 50000), repeat('b', 50000))",
        "SELECT repeat('x', 1000000) FROM range(1000)",
    ],
)
def test_memory_of_a_query_is_limited_and_the_next_one_runs(path: Path, query: str) -> None:
    with open_store(path) as store:
        store.time_limit = 60
        with pytest.raises(UserError, match=r"memory|MiB|not answered"):
            store.sql(query, limit=10_000)
        assert store.sql("SELECT 1 AS one")["one"].tolist() == [1]


def test_the_operating_system_limits_the_process(path: Path) -> None:
    with open_store(path) as store:
        store.sql("SELECT 1")
        process = sql_pool._idle[-1]._process
        limits = {
            name: resource.prlimit(process.pid, getattr(resource, f"RLIMIT_{name}"))[0]
            for name in ("AS", "CPU", "FSIZE", "CORE")
        }
        loaded = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0]) * resource.getpagesize()
        assert SPARE_BYTES < limits["AS"] < loaded + SPARE_BYTES
        assert 5 < limits["CPU"] < 60
        assert limits["FSIZE"] == limits["CORE"] == 0
        variables = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
        names = {variable.partition(b"=")[0].decode() for variable in variables} - {""}
        assert names <= {*sql_pool.KEPT_VARIABLES, "PYTHONPATH", "PYTHONSAFEPATH"}
    with pytest.raises(UserError):
        sql_pool.SqlProcess().ask(
            {"open": {"store": "", "files": {"a": ["/x", ""]}, "search_path": ""}}, seconds=60
        )


def test_memory_is_watched_where_the_system_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(sql_process.os, "_exit", ended.append)
    sql_process._watch_memory(2**20)
    assert ended == [sql_process.OUT_OF_MEMORY]


def test_a_killed_query_costs_only_itself(path: Path) -> None:
    """Others run beside it at the same time, and after it."""
    answers: list[object] = []
    with open_store(path) as store:
        store.sql("SELECT 1")
        store.time_limit = 2

        def endless() -> None:
            try:
                store.sql("SELECT count(*) FROM range(100000000000) a, range(1000000) b")
            except UserError as error:
                answers.append(str(error))

        threads = [threading.Thread(target=endless) for _ in range(2)]
        [thread.start() for thread in threads]
        store._connection.time_limit = 60
        assert store.sql("SELECT count(*) AS n FROM feature")["n"][0] == 24
        [thread.join() for thread in threads]
    assert len(answers) == 2
    assert all("took longer than" in str(answer) for answer in answers)


def test_a_process_that_was_killed_from_outside_is_replaced(path: Path) -> None:
    with open_store(path) as store:
        store.sql("SELECT 1")
        os.kill(sql_pool._idle[-1]._process.pid, signal.SIGKILL)
        time.sleep(0.2)
        assert store.sql("SELECT 1 AS one")["one"].tolist() == [1]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to see processes")
@pytest.mark.parametrize("ending", ["exit", "kill"])
def test_no_process_is_left_after_its_program(path: Path, ending: str) -> None:
    program = textwrap.dedent(f"""
        import os, sys, threading, time
        from saebench.store import open_store
        store = open_store({str(path)!r})
        store.sql("SELECT 1")
        store.time_limit = 600
        slow = "SELECT count(*) FROM range(100000000000) a, range(1000000) b"
        threading.Thread(target=store.sql, args=(slow,), daemon=True).start()
        sys.stdin.read(1)
        {"os._exit(0)" if ending == "exit" else "time.sleep(600)"}
        """)
    running = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, cwd=Path.cwd())
    assert running.stdin is not None
    deadline = time.monotonic() + 60
    while not (started := children(running.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert started
    time.sleep(1)
    running.stdin.write(b"x")
    running.stdin.flush()
    if ending == "kill":
        running.kill()
    running.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in started) and time.monotonic() < deadline + 10:
        time.sleep(0.05)
    assert not [pid for pid in started if Path(f"/proc/{pid}/exe").exists()]


def test_values_of_all_kinds_are_bound(path: Path) -> None:
    values = [
        1, -(2**63), 2**64 - 1, 1.5, True, None, "=cmd'", b"\x00\xff", decimal.Decimal("1.25"),
        datetime.date(2020, 1, 2), datetime.datetime(2020, 1, 2, 3, 4, 5), datetime.timedelta(days=1),
        [1, 2], ["a", None], np.int32(7), np.float32(0.5), np.array([1, 2]), {"a": 1},
    ]  # fmt: skip
    with open_store(path) as store:
        found = store.sql("SELECT " + ", ".join(f"? AS v{n}" for n in range(len(values))), values)
        row = [found.iloc[0, n] for n in range(len(values))]
        assert [*row[:2], *row[3:5]] == [*values[:2], *values[3:5]] and float(row[2]) == 2.0**64
        assert row[6] == "=cmd'" and bytes(row[7]) == b"\x00\xff" and float(row[8]) == 1.25
        assert list(row[12]) == [1, 2] and row[14] == 7 and row[15] == 0.5 and row[17] == {"a": 1}
        with pytest.raises(UserError, match="value 2 of the query, a object, cannot be bound"):
            store.sql("SELECT ?, ?", [1, object()])
        with pytest.raises(UserError, match="not answered"):
            store.sql("SELECT ?")


def test_answers_have_the_types_that_duckdb_gives(path: Path) -> None:
    import duckdb
    import pandas as pd

    expressions = [
        "1::TINYINT", "NULL::INT", "1::HUGEINT", "1.5::DECIMAL(10, 2)", "'nan'::DOUBLE", "true", "'x'",
        "'\\x01'::BLOB",
        "DATE '2000-01-01'", "TIMESTAMP '2000-01-01 01:02:03'", "TIME '01:02:03'", "INTERVAL 1 DAY", "[1, 2]",
        "{'a': 1}", "MAP {1: 2}", "'101'::BIT", "'{}'::JSON", "[1, 2]::INT[2]", "union_value(x := 1)",
        "'ef9084a4-43cd-464f-8e1f-ba364e0c3294'::UUID",
    ]  # fmt: skip
    query = "SELECT " + ", ".join(f"{e} AS c{n}" for n, e in enumerate(expressions))
    with open_store(path) as store, duckdb.connect() as plain:
        pd.testing.assert_frame_equal(store.sql(query), plain.execute(query).df())
        assert store.sql("SELECT 1 AS a, 2 AS a").columns.tolist() == ["a", "a"]
        assert store.sql("SELECT 3::UBIGINT AS a, 1::UINTEGER AS b").dtypes.tolist() == ["int64", "int64"]
        assert len(store.sql("FROM feature WHERE false")) == 0
