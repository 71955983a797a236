"""One generation of one SAE, open for reading: connection, names of what is there, rows and frames."""

from __future__ import annotations

import contextlib
import functools
import numbers
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from saebench.core.errors import UserError
from saebench.store import publish
from saebench.store.database import first_line, open_reader, read_meta, tables_of
from saebench.store.extras import extras_of
from saebench.store.limits import time_limit
from saebench.store.schema import FORMAT_VERSION, nearest
from saebench.store.text import pieces, token_text

if TYPE_CHECKING:
    import duckdb
    import pandas as pd

MOST_LABELS_KEPT = 200_000
"""Labels of documents that are read once and kept; of more documents, those are read that are asked for."""


class StoreReader:
    """The part of a FeatureStore that asks DuckDB; the questions are in query.py.

    Attributes:
        path: directory of the store.
        sae: name of the SAE that is open.
        saes: names of all SAEs of the store.
        generation: number of the generation that is open.
        time_limit: seconds after which a search, a scan or a person's SQL is stopped.
        tables: names of the tables that exist, of the SAE, of its text and of its extras.
    """

    time_limit: float = 5.0

    def __init__(
        self, path: Path, manifest: publish.Manifest, sae: str | None, lock: IO[bytes] | None = None
    ) -> None:
        self.path = path
        self._manifest = manifest
        self.saes = [stored.name for stored in manifest.saes]
        if not self.saes:
            raise UserError(f"the store {path} has no SAE; add one with saebench index")
        self.sae = self.saes[0] if sae is None else sae
        if self.sae not in self.saes:
            raise UserError(f"{sae!r} is not an SAE of the store {path}; {nearest(self.sae, self.saes)}")
        self.generation = manifest.generation
        self._lock = lock
        self._opening = threading.Lock()
        stored = manifest.sae(self.sae)
        text = manifest.texts[stored.text] if stored.text else None
        extras = extras_of(stored)
        for file in [stored.file, *([text] if text else []), *extras.values()]:
            _check_size(path, file)
        self._extras = frozenset(extras)
        self._connection = open_reader(
            path / stored.file.path, path / text.path if text else None,
            {name: path / file.path for name, file in extras.items()},
        )  # fmt: skip
        try:
            self.tables = {
                table for alias in ("sae", "txt", *extras) for table in tables_of(self._connection, alias)
            }
            with self._reading():
                self._meta = read_meta(self._connection)
            version = self._meta.get("format_version")
            if version != FORMAT_VERSION:
                raise UserError(
                    f"{stored.file.path} of the store {path} has format {version} and this saebench reads "
                    f"{FORMAT_VERSION}; run saebench store rebuild {path}, or saebench index again"
                )
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        self._connection.close()
        if self._lock:
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.path)!r}, sae={self.sae!r}, generation={self.generation})"

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn what DuckDB says of damaged blocks into one sentence."""
        import duckdb

        try:
            yield
        except (duckdb.IOException, duckdb.SerializationException, duckdb.InternalException) as error:
            raise UserError(
                f"the store {self.path} is damaged ({first_line(error)}); "
                f"see saebench store check {self.path}, then run saebench index again"
            ) from error

    def _cursor(self) -> duckdb.DuckDBPyConnection:
        with self._opening:
            return self._connection.cursor()

    @contextlib.contextmanager
    def _asking(self, timed: bool) -> Iterator[duckdb.DuckDBPyConnection]:
        """A cursor for one question; ``timed`` when a person's words decide how long it takes."""
        with self._reading(), self._cursor() as cursor, contextlib.ExitStack() as stack:
            if timed:
                stack.enter_context(time_limit(cursor, self.time_limit))
            yield cursor

    def _rows(
        self, query: str, values: Sequence[object] = (), *, timed: bool = False
    ) -> list[tuple[Any, ...]]:
        with self._asking(timed) as cursor:
            rows: list[tuple[Any, ...]] = cursor.execute(query, list(values)).fetchall()
        return rows

    def _frame(self, query: str, values: Sequence[object] = (), *, timed: bool = False) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(self._columns(query, values, timed=timed), copy=False)

    def _columns(self, query: str, values: Sequence[object] = (), *, timed: bool = False) -> dict[str, Any]:
        """Name -> array; making the frame from these takes half as long as DuckDB's own."""
        with self._asking(timed) as cursor:
            columns = cursor.execute(query, list(values)).fetchnumpy()
        return {name: _plain(column) for name, column in columns.items()}

    def arrow(self, query: str, values: Sequence[object] = ()) -> Any:
        """The answer as a pyarrow Table, for columns that are long (scan.py)."""
        with self._reading(), self._cursor() as cursor:
            return cursor.sql(query, params=list(values)).to_arrow_table()

    def _known(self, feature: int) -> int:
        d_sae = self._meta["d_sae"]
        number = isinstance(feature, numbers.Real) and not isinstance(feature, bool)
        if not (number and 0 <= feature < d_sae and int(feature) == feature):
            raise UserError(f"feature {feature!r} is not in {self.sae!r}; it has 0 to {d_sae - 1}")
        return int(feature)

    def why_missing(self, table: str) -> str:
        """Why the store has no such table, as its index said it."""
        reasons = {**self._meta["left_out"], **self._meta["missing"]}
        return str(reasons.get(table, "it was indexed without"))

    def require(self, table: str) -> None:
        """Raise a UserError that says why the store has no ``table``, if it has none."""
        self._require(table)

    def _require(self, table: str) -> None:
        if table not in self.tables:
            raise UserError(
                f"the store {self.path} has no table {table!r} for {self.sae!r}: {self.why_missing(table)}"
            )

    def _labels(self, docs: Iterable[int]) -> dict[int, str | None]:
        wanted = [int(doc) for doc in docs]
        if not wanted or "document" not in self.tables:
            return {}
        if self._meta["n_documents"] <= MOST_LABELS_KEPT:
            return {doc: self._all_labels[doc] for doc in wanted}
        query = "SELECT doc, label FROM txt.document WHERE doc IN (SELECT unnest(?))"
        return dict(self._rows(query, [wanted]))

    @functools.cached_property
    def _all_labels(self) -> list[str | None]:
        return [label for (label,) in self._rows("SELECT label FROM txt.document ORDER BY doc")]

    def _pieces(self, tokens: Sequence[int]) -> list[str]:
        return pieces([self._vocab[token] for token in tokens])

    def _with_text(self, frame: pd.DataFrame) -> pd.DataFrame:
        at = frame.columns.get_loc("token")
        frame.insert(at + 1, "text", [token_text(self._vocab[token]) for token in frame["token"]])
        return frame

    @property
    def vocab(self) -> list[bytes]:
        """Every token's exact bytes; empty in a store without text."""
        return self._vocab

    @functools.cached_property
    def _vocab(self) -> list[bytes]:
        """All tokens: once read, naming one costs nothing, where a join costs milliseconds."""
        if "token" not in self.tables:
            return []
        return [token for (token,) in self._rows("SELECT bytes FROM txt.token ORDER BY token")]


def _check_size(store: Path, file: publish.StoredFile) -> None:
    """The cheap check; saebench store check computes the checksums too."""
    path = store / file.path
    if path.is_file() and (size := path.stat().st_size) != file.bytes:
        raise UserError(
            f"{path} has {size:,} bytes where its manifest says {file.bytes:,}; run saebench index again"
        )


def _plain(column: Any) -> Any:
    """A column as pandas likes it: signed, since differences of positions must not wrap; NULL as missing."""
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
