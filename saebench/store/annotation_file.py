"""The SQLite file of annotations: transactions, checks of entries, and safe use by several processes."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from saebench.core.errors import UserError
from saebench.core.files import TEMPORARY_SUFFIX, sync_directory
from saebench.core.refusals import FORBIDDEN

FILE = "user.sqlite"
FORMAT = "saebench annotations"
FORMAT_VERSION = 1
APPLICATION_ID = 0x5AEB0001
BUSY_SECONDS = 30.0

LONGEST_LABEL = 200
LONGEST_COMMENT = 10_000
LONGEST_NAME = 100
LONGEST_VIEW = 4_000

TABLES = {
    "labels": ("sae", "feature", "label", "author", "time"),
    "bookmarks": ("sae", "feature", "author", "time"),
    "comments": ("sae", "id", "feature", "comment", "author", "time"),
    "list_entries": ("sae", "name", "feature", "author", "time"),
    "views": ("sae", "name", "query", "author", "time"),
}
"""Table -> its columns. All names in SQL are from here."""
KEYS = {
    "labels": ("sae", "feature"),
    "bookmarks": ("sae", "feature"),
    "comments": ("sae", "id"),
    "list_entries": ("sae", "name", "feature"),
    "views": ("sae", "name"),
}
ORDERS = {
    "labels": "sae, feature",
    "bookmarks": "sae, feature",
    "comments": "time, id",
    "list_entries": "rowid",
    "views": "sae, name",
}
LIMITS = {
    "label": LONGEST_LABEL,
    "comment": LONGEST_COMMENT,
    "name": LONGEST_NAME,
    "query": LONGEST_VIEW,
    "author": LONGEST_NAME,
    "id": LONGEST_NAME,
    "time": LONGEST_NAME,
}
MAY_BE_EMPTY = {"author", "query"}


class AnnotationFile:
    """``user.sqlite`` of the store ``path.parent``; each use opens it, does one transaction and closes it."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self._read_only = read_only

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection | None]:
        """A connection that sees one snapshot of the file; None when the file does not exist."""
        if not self.path.exists():
            yield None
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._sentences())
            log, index = (self.path.with_name(f"{FILE}{end}") for end in ("-wal", "-shm"))
            place = self.path
            if log.exists() and not index.exists() and not os.access(self.path.parent, os.W_OK):
                # SQLite cannot make the index of the log there, and the newest entries are in the log.
                place = Path(stack.enter_context(tempfile.TemporaryDirectory())) / FILE
                shutil.copyfile(self.path, place)
                shutil.copyfile(log, place.with_name(log.name))
            connection = stack.enter_context(contextlib.closing(self._connect(place)))
            connection.execute("BEGIN")
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A write transaction, one at a time; it is committed on a clean exit and rolled back otherwise."""
        if self._read_only:
            raise UserError(f"{self.path} was opened read-only; open it without read_only to change it")
        with self._sentences():
            if not self.path.exists():
                self._make()
            with contextlib.closing(self._connect(self.path)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise

    def _connect(self, place: Path) -> sqlite3.Connection:
        """A connection to ``place``, which is this file or a copy of it."""
        connection = self._open(place)
        try:
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if application != APPLICATION_ID:
                raise UserError(
                    f"{self.path} is not a file of annotations, or a damaged one; move it away (nothing in "
                    "it was changed), or put a copy in its place"
                )
            if version > FORMAT_VERSION:
                raise UserError(
                    f"the annotations {self.path} have format {version} and this saebench reads up to "
                    f"{FORMAT_VERSION}; install a newer saebench"
                )
        except BaseException:
            connection.close()
            raise
        return connection

    @staticmethod
    def _open(place: Path) -> sqlite3.Connection:
        mode = "rw" if os.access(place, os.W_OK) else "ro"
        address = f"{place.absolute().as_uri()}?mode={mode}"
        directory_is_fixed = not os.access(place.parent, os.W_OK)
        if directory_is_fixed and not place.with_name(f"{FILE}-wal").exists():
            address += (
                "&immutable=1"  # SQLite cannot make the index of its log there, and no other process writes
            )
        connection = sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    def _make(self) -> None:
        """Create an empty file atomically; of several processes, the first one creates it."""
        directory = os.open(self.path.parent, os.O_RDONLY)
        temporary = self.path.with_name(f".{FILE}.{os.getpid()}{TEMPORARY_SUFFIX}")
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            if self.path.exists():
                return
            for left in self.path.parent.glob(f".{FILE}.*{TEMPORARY_SUFFIX}*"):
                left.unlink(missing_ok=True)
            with contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
                for table, columns in TABLES.items():
                    kinds = [f"{c} {'INTEGER' if c == 'feature' else 'TEXT'} NOT NULL" for c in columns]
                    key = ", ".join(KEYS[table])
                    connection.execute(f"CREATE TABLE {table} ({', '.join(kinds)}, PRIMARY KEY ({key}))")
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
            os.replace(temporary, self.path)
            sync_directory(self.path.parent)
        finally:
            os.close(directory)  # first: a lock that is kept would block the next call for ever
            for left in (temporary, *(Path(f"{temporary}{end}") for end in ("-wal", "-shm"))):
                left.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _sentences(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise UserError(f"the store {self.path.parent} is not there; check the path") from None
        except (sqlite3.OperationalError, OSError) as error:
            is_forbidden = isinstance(error, OSError) and error.errno in FORBIDDEN
            if isinstance(error, OSError) and not is_forbidden:
                raise
            if "locked" in str(error):
                reason = f"another process has been writing for {BUSY_SECONDS:g} s; try again"
            elif "full" in str(error):
                reason = "the disk is full; free some space and try again"
            elif (
                is_forbidden
                or "readonly" in str(error)
                or ("unable to open" in str(error) and not os.access(self.path.parent, os.W_OK))
            ):
                reason = "it may not be written; ask for write access to the store"
            else:
                reason = f"{error}; check the store's directory"
            raise UserError(f"the annotations {self.path} cannot be used: {reason}") from error
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise UserError(
                f"the annotations {self.path} are damaged ({error}); move the file away (nothing in it was "
                "changed), or put a copy in its place"
            ) from error


def now() -> str:
    """The time in UTC, ISO 8601 with microseconds; the order of the text is the order of time."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def where(chosen: Mapping[str, Any]) -> tuple[str, list[Any]]:
    return " AND ".join(f"{column} = ?" for column in chosen), list(chosen.values())


def select(
    connection: sqlite3.Connection, table: str, columns: Sequence[str], chosen: Mapping[str, Any] = {}
) -> list[tuple[Any, ...]]:
    condition, values = where(chosen) if chosen else ("true", [])
    query = f"SELECT {', '.join(columns)} FROM {table} WHERE {condition} ORDER BY {ORDERS[table]}"
    return connection.execute(query, values).fetchall()


def insert(connection: sqlite3.Connection, table: str, row: Mapping[str, Any], on_conflict: str) -> int:
    """Insert one row; returns the number of rows changed, 1 or 0."""
    columns = TABLES[table]
    marks = ", ".join("?" * len(columns))
    query = (
        f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks}) "
        f"ON CONFLICT ({', '.join(KEYS[table])}) {on_conflict}"
    )
    return connection.execute(query, [row[column] for column in columns]).rowcount


def replacing(table: str) -> str:
    """The ON CONFLICT clause with which a row replaces the one of the same key."""
    changed = [column for column in TABLES[table] if column not in KEYS[table]]
    return "DO UPDATE SET " + ", ".join(f"{column} = excluded.{column}" for column in changed)


def newer(table: str) -> str:
    """The ON CONFLICT clause that keeps the newer of two entries; of equally old ones, the greater text."""
    if table not in ("labels", "views"):
        return "DO NOTHING"
    text = {"labels": "label", "views": "query"}[table]
    own, new = (f"({side}.time, {side}.{text}, {side}.author)" for side in (table, "excluded"))
    return f"{replacing(table)} WHERE {new} > {own}"


def checked_row(table: str, row: Mapping[str, Any], what: str | None = None) -> dict[str, Any]:
    """``row``, after a check that it has exactly the columns of ``table``, with valid values."""
    place = f" in {what}" if what else ""
    if set(row) != set(TABLES[table]):
        raise UserError(
            f"an entry of {table!r}{place} has not just {', '.join(TABLES[table])}; make it again"
        )
    for column, value in row.items():
        if column == "feature":
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
                raise UserError(f"feature {value!r}{place} is not the number of a feature")
            continue
        if not isinstance(value, str) or "\x00" in value or not _is_text(value):
            raise UserError(f"the {column} {str(value)[:50]!r}{place} is not text")
        longest = LIMITS.get(column, LONGEST_NAME)
        if len(value) > longest:
            raise UserError(
                f"the {column}{place} has {len(value):,} characters; it may have {longest:,} at most"
            )
        if not value.strip() and column not in MAY_BE_EMPTY:
            raise UserError(f"the {column}{place} is empty; write something")
        if column != "comment" and len(value.splitlines()) > 1:
            raise UserError(f"the {column}{place} has several lines; use one, or a comment")
    return dict(row)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def checked(content: Any, what: str) -> dict[str, list[dict[str, Any]]]:
    """Table -> rows of an export, after a check of all of them."""
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise UserError(f"{what} is not an export of annotations; make one with export_json")
    version = content.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(
            f"{what} has format {version} and this saebench reads up to {FORMAT_VERSION}; install a newer one"
        )
    rows = {}
    for table in TABLES:
        entries = content.get(table, [])
        if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
            raise UserError(f"{table!r} in {what} is not a list of entries; make the export again")
        rows[table] = [checked_row(table, entry, what) for entry in entries]
        for entry in rows[table]:
            _check_time(entry["time"], what)
    return rows


def _check_time(time: str, what: str) -> None:
    try:
        datetime.datetime.strptime(time, "%Y-%m-%dT%H:%M:%S.%fZ")
    except ValueError:
        raise UserError(f"the time {time!r} in {what} is not like {now()}") from None
