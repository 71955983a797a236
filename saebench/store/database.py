"""DuckDB connections: how store files are written and how they are read."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.core.errors import UserError
from saebench.store.schema import EXTRA_TABLES, Table

if TYPE_CHECKING:
    import duckdb

CORRUPT = "Corrupt database file"
"""In the message of DuckDB, and of Arrow that reads from it, when the checksum of a block is wrong."""
READER_MEMORY = "2GiB"
WRITER_MEMORY = "1GiB"

# Late materialization makes "WHERE feature = ? ORDER BY value DESC LIMIT n" several times slower, and with
# a range of rowids it ends in an internal error (DuckDB 2.0.0);
# test_late_materialization_is_disabled in tests/store/test_database.py shows it.
DISABLED_OPTIMIZERS = "late_materialization"


def n_threads() -> int:
    return min(4, os.cpu_count() or 1)


def open_reader(
    sae_file: Path, text_file: Path | None = None, extras: Mapping[str, Path] | None = None
) -> duckdb.DuckDBPyConnection:
    """A read-only connection in which ``sae.<table>`` and ``txt.<table>`` are the two files.

    Each of ``extras`` is attached under its name, which must be one that the schema knows.

    The files are attached to an instance of their own, because DuckDB shares one instance among all
    connections of a process to the same path. Queries can reach no other file and change no setting.

    Raises:
        UserError: a file is missing, damaged, or locked by a writer.
    """
    connection = memory_instance(READER_MEMORY)
    try:
        assert set(extras or {}) <= set(EXTRA_TABLES), extras
        named = [(file, name) for name, file in (extras or {}).items()]
        for path, alias in ((sae_file, "sae"), (text_file, "txt"), *named):
            if path is not None:
                attach(connection, path, alias)
        lock_down(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def memory_instance(memory: str) -> duckdb.DuckDBPyConnection:
    """A connection to an empty instance of its own, which sees no variable of the program."""
    import duckdb

    return duckdb.connect(":memory:", config=_offline(memory) | {"python_enable_replacements": "false"})


def damaged(store: Path, reason: str) -> UserError:
    """What to say about a store of which something cannot be read."""
    return UserError(
        f"the store {store} is damaged ({reason}); see saebench store check {store}, "
        "then run saebench index again"
    )


@contextlib.contextmanager
def reading(store: Path, *, opening: bool = False) -> Iterator[None]:
    """Turn what the damaged file of a store makes DuckDB raise into one sentence.

    While a store is ``opening``, this includes missing tables; later, the query is wrong that names them.
    """
    import duckdb

    try:
        yield
    except (duckdb.OutOfMemoryException, duckdb.InterruptException):
        raise
    except duckdb.ProgrammingError as error:
        if not opening:
            raise
        raise damaged(store, first_line(error)) from error
    except (duckdb.Error, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise damaged(store, first_line(error)) from error
    except (OSError, ValueError) as error:  # from Arrow, which reads on while the rows are used
        if CORRUPT not in str(error):
            raise
        raise damaged(store, first_line(error)) from error


def attach(connection: duckdb.DuckDBPyConnection, path: Path, alias: str) -> None:
    """Attach a store file for reading.

    Raises:
        UserError: it is missing, damaged, or locked by a writer.
    """
    import duckdb

    if not path.is_file():
        raise UserError(f"{path} is missing from the store; run saebench index again")
    try:
        connection.execute(f"ATTACH {quoted(path)} AS {alias} (READ_ONLY)")
    except duckdb.Error as error:
        if "lock on file" in str(error):
            raise UserError(
                f"{path} is open for writing in another program, where a store is only ever read; close that"
            ) from error
        raise UserError(f"{path} cannot be read ({first_line(error)}); run saebench index again") from error


def lock_down(connection: duckdb.DuckDBPyConnection) -> None:
    """From now on, ``connection`` reaches no other file and changes no setting."""
    connection.execute(f"SET disabled_optimizers = '{DISABLED_OPTIMIZERS}'")
    connection.execute("SET temp_directory = ''")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


@contextlib.contextmanager
def new_database(path: Path, tables: Iterable[Table]) -> Iterator[duckdb.DuckDBPyConnection]:
    """Create a database file with empty ``tables``; on a clean exit it is one complete, synced file.

    Raises:
        UserError: the disk is full or refuses the write.
    """
    import duckdb

    with sentence_for_duckdb_errors(path):
        connection = duckdb.connect(str(path), config=_offline(WRITER_MEMORY))
        try:
            connection.execute(f"SET temp_directory = {quoted(path.with_suffix('.tmp'))}")
            for table in tables:
                connection.execute(table.create())
            yield connection
            connection.execute("CHECKPOINT")
        finally:
            connection.close()
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def sentence_for_duckdb_errors(path: Path) -> Iterator[None]:
    """Turn DuckDB's report of a full disk into one sentence about ``path``."""
    import duckdb

    try:
        yield
    except duckdb.Error as error:
        message = str(error)
        if any(sign in message for sign in ("No space left", "File too large", "Disk quota", "full disk")):
            raise UserError(
                f"no space left while writing {path}; free some space or choose another place, "
                "then run the same command again"
            ) from error
        raise


def insert(connection: duckdb.DuckDBPyConnection, table: Table, columns: dict[str, Any]) -> None:
    """Append rows given as one array, list or Arrow array a column (any order, all of them)."""
    import pyarrow

    assert set(columns) == set(table.names), set(columns) ^ set(table.names)
    rows = pyarrow.table({name: columns[name] for name in table.names})
    connection.register("_rows", rows)
    connection.execute(f"INSERT INTO {table.name} SELECT * FROM _rows")
    connection.unregister("_rows")


def insert_meta(connection: duckdb.DuckDBPyConnection, table: Table, meta: dict[str, Any]) -> None:
    values = [json.dumps(meta[key], sort_keys=True, ensure_ascii=False) for key in sorted(meta)]
    insert(connection, table, {"key": sorted(meta), "value": values})


def read_meta(connection: duckdb.DuckDBPyConnection, alias: str = "sae") -> dict[str, Any]:
    rows = connection.execute(f"SELECT key, value FROM {alias}.meta").fetchall()
    return {key: json.loads(value) for key, value in rows}


def tables_of(connection: duckdb.DuckDBPyConnection, alias: str) -> set[str]:
    rows = connection.execute(
        "SELECT table_name FROM duckdb_tables() WHERE database_name = ?", [alias]
    ).fetchall()
    return {name for (name,) in rows}


def _offline(memory: str) -> dict[str, Any]:
    return {
        "threads": n_threads(),
        "memory_limit": memory,
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "allow_community_extensions": "false",
        "allow_persistent_secrets": "false",
    }


def quoted(path: Path) -> str:
    """A path as a string of SQL, where no parameter can stand."""
    return "'" + str(path).replace("'", "''") + "'"


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
