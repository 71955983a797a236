"""A user's own SQL: one read-only query, limited in rows and seconds, on its own connection.

There are three defenses, each of which stops most attacks. The files are attached read-only to an instance
that cannot open other files or change settings. DuckDB's own parser determines the kind of statement. The
parsed query may contain known table functions only, and no statement that writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.core.errors import UserError
from saebench.store import publish
from saebench.store.database import attach, first_line, lock_down, memory_instance
from saebench.store.extras import extras_of
from saebench.store.limits import time_limit

if TYPE_CHECKING:
    import duckdb
    import pandas as pd

LONGEST_QUERY = 20_000
SQL_MEMORY = "1GiB"
KINDS = "SELECT, WITH, DESCRIBE, SHOW or SUMMARIZE"
TABLE_FUNCTIONS = {
    "range", "generate_series", "unnest", "repeat", "json_each", "json_tree", "duckdb_columns",
    "duckdb_tables", "duckdb_functions", "pragma_table_info", "pragma_storage_info",
}  # fmt: skip
"""Table functions that read only the database, or nothing; all others are refused."""
REFUSED_FUNCTIONS = {
    "repeat", "lpad", "rpad", "bar", "format", "printf", "range", "generate_series", "list_resize",
    "array_resize", "sleep_ms", "write_log", "getenv", "current_setting",
}  # fmt: skip
"""Functions that make one value of any size, which neither limit stops, or read outside the database.

``range`` and ``generate_series`` are fine after FROM, where they make rows. This guards against accidents:
who may run SQL here may still use up memory on purpose.
"""


class SqlConsole:
    """The query of `FeatureStore.sql`. ``sae`` is the open SAE, ``sae1``, ``sae2``, ... are all of the store.

    Names without a prefix are looked up in the open SAE, then in its text, ``txt``, and in its extras.

    Raises:
        UserError: a file is missing or damaged.
    """

    def __init__(self, store: Path, manifest: publish.Manifest, sae: str) -> None:
        self.path = store
        chosen = manifest.sae(sae)
        text = manifest.texts[chosen.text] if chosen.text else None
        self._connection = memory_instance(SQL_MEMORY)
        try:
            attach(self._connection, store / chosen.file.path, "sae")
            if text:
                attach(self._connection, store / text.path, "txt")
            for number, stored in enumerate(manifest.saes, 1):
                if stored.name != sae:
                    attach(self._connection, store / stored.file.path, f"sae{number}")
            extras = extras_of(chosen)
            for name, file in extras.items():
                attach(self._connection, store / file.path, name)
            names = ["sae", *(["txt"] if text else []), *extras]
            self._search_path = ",".join(f"{name}.main" for name in names)
            lock_down(self._connection)
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        self._connection.close()

    def ask(self, query: str, values: Sequence[object], *, limit: int, seconds: float) -> pd.DataFrame:
        """At most ``limit`` rows; ``.attrs["more"]`` says whether there were more.

        Raises:
            UserError: it is not one question, or not allowed, or wrong, or took too long.
        """
        import duckdb
        import pandas as pd

        with self._connection.cursor() as cursor:
            cursor.execute(f"SET search_path = '{self._search_path}'")  # each cursor has its own
            try:
                statement = _one_question(cursor, query)
                with time_limit(cursor, seconds):
                    cursor.execute(statement, list(values))
                    frames = [cursor.fetch_df_chunk()]
                    while len(frames[-1]) and sum(map(len, frames)) <= limit:
                        frames.append(cursor.fetch_df_chunk())
            except (duckdb.Error, UnicodeEncodeError, RuntimeError) as error:
                raise UserError(f"the query was not answered: {first_line(error)}") from None
        filled = [frame for frame in frames if len(frame)] or frames[:1]
        found = pd.concat(filled, ignore_index=True)
        answer = _signed(found.head(limit))
        answer.attrs["more"] = len(found) > limit
        return answer


def _one_question(cursor: duckdb.DuckDBPyConnection, query: str) -> Any:
    """The one statement of ``query``, known to be a harmless question."""
    import duckdb

    if len(query) > LONGEST_QUERY:
        raise UserError(f"the query has {len(query):,} characters; it may have {LONGEST_QUERY:,} at most")
    try:
        query.encode()
    except UnicodeEncodeError:
        raise UserError("the query holds half a character (a lone surrogate); take it out") from None
    statements = cursor.extract_statements(query)
    if len(statements) != 1:
        what = "holds no statement" if not statements else f"holds {len(statements)} statements"
        raise UserError(f"the query {what}; write one {KINDS}")
    if statements[0].type != duckdb.StatementType.SELECT:
        kind = str(statements[0].type).rpartition(".")[2]
        raise UserError(f"a store answers questions only, and {kind} is none; write {KINDS}")
    parsed = json.loads(cursor.execute("SELECT json_serialize_sql(?)", [query]).fetchall()[0][0])
    if parsed.get("error"):
        raise UserError(f"the query cannot be checked ({parsed.get('error_message')}); write {KINDS}")
    for node in _nodes(parsed):
        _refuse(node)
    return statements[0]


def _refuse(node: dict[str, Any]) -> None:
    kind = str(node.get("type"))
    if kind.endswith("_QUERY_NODE"):
        verb = kind.removesuffix("_QUERY_NODE")
        raise UserError(f"a store answers questions only, and {verb} is none; write {KINDS}")
    if kind == "TABLE_FUNCTION":
        name = str((node.get("function") or {}).get("function_name")).lower()
        if name not in TABLE_FUNCTIONS:
            raise UserError(
                f"the table function {name!r} is not for stores; SHOW ALL TABLES lists what can be queried"
            )
    elif node.get("class") == "FUNCTION":
        name = str(node.get("function_name")).lower()
        if name in REFUSED_FUNCTIONS:
            raise UserError(f"the function {name!r} is not for stores; leave it out of the query")


def _nodes(tree: Any, table_function: bool = False) -> Iterator[dict[str, Any]]:
    """All objects of a parsed query; not the call inside a table function, which is judged with it."""
    if isinstance(tree, dict):
        if not table_function:
            yield tree
        for name, value in tree.items():
            yield from _nodes(value, tree.get("type") == "TABLE_FUNCTION" and name == "function")
    elif isinstance(tree, list):
        for value in tree:
            yield from _nodes(value)


def _signed(frame: pd.DataFrame) -> pd.DataFrame:
    """``frame`` with signed integers for unsigned ones: differences of positions must not wrap around."""
    kinds = {
        name: "Int64" if str(kind).startswith("U") else "int64"
        for name, kind in frame.dtypes.items()
        if str(kind).lower().startswith("uint")
    }
    made: pd.DataFrame = frame.astype(kinds)
    return made
