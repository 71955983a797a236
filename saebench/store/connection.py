"""StoreConnection: one generation of one SAE of a store, open for reading, with its metadata and queries."""

from __future__ import annotations

import contextlib
import numbers
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from saebench.core.errors import UserError
from saebench.store import publish
from saebench.store.database import open_reader, read_meta, reading, tables_of
from saebench.store.extras import extras_of
from saebench.store.limits import time_limit
from saebench.store.schema import FORMAT_VERSION, nearest

if TYPE_CHECKING:
    import duckdb
    import pandas as pd

MOST_ROWS = 2**62
"""A LIMIT that is none: the largest round number that fits in a BIGINT."""
OPEN_ATTEMPTS = 5


class StoreConnection:
    """The files of one SAE of one generation, attached read-only as ``sae``, ``txt`` and the extras' names.

    Safe to use from several threads. The readers (saebench/store/readers) share one connection.

    Attributes:
        path: directory of the store.
        manifest: the manifest of the open generation.
        sae: name of the SAE that is open.
        saes: names of all SAEs of the store.
        meta: the meta table of the SAE.
        tables: names of the tables that exist, of the SAE, of its text and of its extras.
        extras: names of the extras that exist.
        time_limit: seconds after which a search, a scan or a user's SQL is stopped.
    """

    time_limit: float = 5.0

    def __init__(
        self, path: Path, manifest: publish.Manifest, sae: str | None, lock: IO[bytes] | None = None
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.saes = [stored.name for stored in manifest.saes]
        if not self.saes:
            raise UserError(f"the store {path} has no SAE; add one with saebench index")
        self.sae = self.saes[0] if sae is None else sae
        self.require_sae(self.sae)
        self._lock = lock
        self._opening = threading.Lock()
        stored = manifest.sae(self.sae)
        text = manifest.texts[stored.text] if stored.text else None
        extras = extras_of(stored)
        for file in [stored.file, *([text] if text else []), *extras.values()]:
            _check_size(path, file)
        self.extras = frozenset(extras)
        self._connection = open_reader(
            path / stored.file.path,
            path / text.path if text else None,
            {name: path / file.path for name, file in extras.items()},
        )
        try:
            with reading(path, opening=True):
                self.tables = {
                    table for alias in ("sae", "txt", *extras) for table in tables_of(self._connection, alias)
                }
                self.meta = self.read_meta("sae")
            version = self.meta.get("format_version")
            if version != FORMAT_VERSION:
                raise UserError(
                    f"{stored.file.path} of the store {path} has format {version} and this saebench reads "
                    f"{FORMAT_VERSION}; run saebench store rebuild {path}, or saebench index again"
                )
        except BaseException:
            self._connection.close()
            raise

    @classmethod
    def open(cls, path: Path, sae: str | None = None) -> StoreConnection:
        """Open the current generation. Opens again when another one is published at this moment.

        Raises:
            UserError: no store at ``path``, a newer format, an unknown ``sae``, or a damaged file.
        """
        for attempt in range(OPEN_ATTEMPTS):
            manifest = publish.read_manifest(path)
            lock = publish.hold(path, manifest)
            try:
                return cls(path, manifest, sae, lock)
            except BaseException as error:
                if lock:
                    lock.close()
                replaced = publish.read_manifest(path).generation != manifest.generation
                if not (isinstance(error, UserError) and replaced and attempt + 1 < OPEN_ATTEMPTS):
                    raise
        raise AssertionError

    def beside(self, sae: str) -> StoreConnection:
        """A connection to another SAE of the same generation, to be closed separately."""
        return StoreConnection(self.path, self.manifest, sae, publish.hold(self.path, self.manifest))

    def close(self) -> None:
        self._connection.close()
        if self._lock:
            self._lock.close()

    # Queries

    def rows(
        self, query: str, values: Sequence[object] = (), *, timed: bool = False
    ) -> list[tuple[Any, ...]]:
        """The answer as tuples; ``timed`` applies the time limit, for queries whose cost the user decides."""
        with self._cursor(timed) as cursor:
            rows: list[tuple[Any, ...]] = cursor.execute(query, list(values)).fetchall()
        return rows

    def frame(self, query: str, values: Sequence[object] = (), *, timed: bool = False) -> pd.DataFrame:
        """The answer as a DataFrame, with signed integers."""
        import pandas as pd

        return pd.DataFrame(self.columns(query, values, timed=timed), copy=False)

    def columns(self, query: str, values: Sequence[object] = (), *, timed: bool = False) -> dict[str, Any]:
        """Name -> array; making the frame from these takes half as long as DuckDB's own."""
        with self._cursor(timed) as cursor:
            columns = cursor.execute(query, list(values)).fetchnumpy()
        return {name: _plain(column) for name, column in columns.items()}

    def arrow(self, query: str, values: Sequence[object] = ()) -> Any:
        """The answer as a pyarrow Table, for long columns (scan.py)."""
        with self._cursor() as cursor:
            return cursor.sql(query, params=list(values)).to_arrow_table()

    @contextlib.contextmanager
    def record_batches(
        self, query: str, values: Sequence[object] = (), *, rows: int = 122_880
    ) -> Iterator[Any]:
        """A pyarrow RecordBatchReader over the answer, in the query's order, ``rows`` rows at a time."""
        with self._cursor() as cursor:
            yield cursor.sql(query, params=list(values)).to_arrow_reader(rows)

    def read_meta(self, alias: str) -> dict[str, Any]:
        """The meta table of the file attached as ``alias``."""
        with self._cursor() as cursor:
            return read_meta(cursor, alias)

    @contextlib.contextmanager
    def _cursor(self, timed: bool = False) -> Iterator[duckdb.DuckDBPyConnection]:
        """A cursor for one query; DuckDB's errors about damaged blocks become a UserError."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(reading(self.path))
            with self._opening:
                cursor = stack.enter_context(self._connection.cursor())
            if timed:
                stack.enter_context(time_limit(cursor, self.time_limit))
            yield cursor

    # What exists

    def has(self, table: str) -> bool:
        """Whether the store has a table."""
        return table in self.tables

    def why_missing(self, table: str) -> str:
        """Why the store does not have a table, as recorded when it was indexed."""
        reasons = {**self.meta["left_out"], **self.meta["missing"]}
        return str(reasons.get(table, "it was indexed without"))

    def require(self, table: str) -> None:
        """Do nothing if the store has a table.

        Raises:
            UserError: it does not; the error names the reason.
        """
        if table not in self.tables:
            raise UserError(
                f"the store {self.path} has no table {table!r} for {self.sae!r}: {self.why_missing(table)}"
            )

    def require_sae(self, sae: str) -> None:
        """Do nothing if the store has an SAE of this name.

        Raises:
            UserError: it does not; the nearest names are offered.
        """
        if sae not in self.saes:
            raise UserError(f"{sae!r} is not an SAE of the store {self.path}; {nearest(sae, self.saes)}")

    def require_feature(self, feature: int) -> int:
        """``feature`` as an int, if it is the number of a feature of this SAE.

        Raises:
            UserError: it is not.
        """
        d_sae = self.meta["d_sae"]
        number = isinstance(feature, numbers.Real) and not isinstance(feature, bool)
        if not (number and 0 <= feature < d_sae and int(feature) == feature):
            raise UserError(f"feature {feature!r} is not in {self.sae!r}; it has 0 to {d_sae - 1}")
        return int(feature)


def limit_of(name: str, value: int | None) -> int:
    """A limit or an offset as DuckDB takes it; None means no limit.

    Raises:
        UserError: it is negative.
    """
    if value is None:
        return MOST_ROWS
    if value < 0:
        raise UserError(f"{name} is {value}; it must be at least 0")
    return min(int(value), MOST_ROWS)


def _check_size(store: Path, file: publish.StoredFile) -> None:
    """The cheap check; saebench store check computes the checksums too."""
    path = store / file.path
    if path.is_file() and (size := path.stat().st_size) != file.bytes:
        raise UserError(
            f"{path} has {size:,} bytes where its manifest says {file.bytes:,}; run saebench index again"
        )


def _plain(column: Any) -> Any:
    """A column with signed integers, since differences of positions must not wrap; NULL as missing."""
    import numpy as np
    import pandas as pd

    missing, kind = getattr(column, "mask", None), column.dtype.kind
    if missing is None:
        return column.astype(np.int64) if kind == "u" else column
    if kind in "iu":
        return pd.arrays.IntegerArray(column.data.astype(np.int64), missing.copy())
    if kind == "b":
        return pd.arrays.BooleanArray(column.data, missing.copy())
    filled = column.data.copy()
    filled[missing] = np.nan if kind == "f" else None
    return filled
