"""A user's own SQL: one read-only query, limited in rows, bytes, time and memory, in a process of its own.

There are three defenses, each of which stops most attacks. The query may name only what the catalog of the
store's files lists (sql_rules.py). The process that runs it attaches the files read-only and can neither open
others nor change settings; it has no environment, secrets or extensions (sql_process.py). The operating
system limits its memory and its processor time, and it is killed when its time is over, which costs that
query only (sql_pool.py).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.core.errors import UserError
from saebench.store import publish
from saebench.store.database import memory_instance
from saebench.store.extras import extras_of
from saebench.store.sql_pool import release, sql_process
from saebench.store.sql_process import SQL_MEMORY

if TYPE_CHECKING:
    import pandas as pd


class SqlConsole:
    """The query of `FeatureStore.sql`. ``sae`` is the open SAE, ``sae1``, ``sae2``, ... are all of the store.

    Names without a prefix are looked up in the open SAE, then in its text, ``txt``, and in its extras.
    """

    def __init__(self, store: Path, manifest: publish.Manifest, sae: str) -> None:
        chosen = manifest.sae(sae)
        own = {"sae": chosen.file}
        if chosen.text:
            own["txt"] = manifest.texts[chosen.text]
        own |= extras_of(chosen)
        numbered = enumerate(manifest.saes, 1)
        files = own | {f"sae{number}": stored.file for number, stored in numbered if stored.name != sae}
        self._opening = {
            "store": str(store),
            "files": {alias: [str((store / f.path).absolute()), f.sha256] for alias, f in files.items()},
            "search_path": ",".join(f"{alias}.main" for alias in own),
        }
        self._lock = threading.Lock()
        self._frames: Any = None

    def close(self) -> None:
        release(self._opening)
        with self._lock:
            if self._frames:
                self._frames.close()

    def ask(self, query: str, values: Sequence[object], *, limit: int, seconds: float) -> pd.DataFrame:
        """At most ``limit`` rows; ``.attrs["more"]`` says whether there were more.

        Raises:
            UserError: it is not one question, or not allowed, or wrong, or needed too much time or memory.
        """
        request, given = {"query": query, "limit": limit, "seconds": seconds}, _stream(values)
        with sql_process(self._opening) as process:
            reply, rows = process.ask(request, given, seconds=seconds)
        answer = _signed(self._frame(rows))
        answer.attrs["more"] = reply["more"]
        return answer

    def _frame(self, rows: bytes) -> pd.DataFrame:
        """The rows with the types that DuckDB gives to pandas."""
        import pyarrow

        table = pyarrow.ipc.open_stream(rows).read_all()
        table.validate(full=True)
        with self._lock:
            if self._frames is None:
                self._frames = memory_instance(SQL_MEMORY)
            frame: pd.DataFrame = self._frames.from_arrow(table).df()
        frame.columns = table.schema.names  # two columns may have one name
        return frame


def _stream(values: Sequence[object]) -> bytes:
    """``values`` as an Arrow stream of one row.

    Raises:
        UserError: one has a type that Arrow does not have.
    """
    import pyarrow

    if not values:
        return b""
    columns = {}
    for number, value in enumerate(values):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            value = Decimal(value)
        try:
            columns[str(number)] = pyarrow.array([value])
        except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise UserError(
                f"value {number + 1} of the query, a {type(value).__name__}, cannot be bound ({error}); "
                "give a number, a text, bytes, a time, or a list of these"
            ) from None
    table, sink = pyarrow.table(columns), pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _signed(frame: pd.DataFrame) -> pd.DataFrame:
    """``frame`` with signed integers for unsigned ones: differences of positions must not wrap around."""
    kinds = {
        place: "Int64" if str(kind).startswith("U") else "int64"
        for place, kind in enumerate(frame.dtypes)
        if str(kind).lower().startswith("uint")
    }
    for place, kind in kinds.items():
        frame.isetitem(place, frame.iloc[:, place].astype(kind))
    return frame
