"""Which SQL of a person may run: one question about the store's tables, with functions of their values.

DuckDB's parser turns the query into a tree. Every part of the tree must be of a known kind, every table must
be one that the catalog lists for the store's files, and every function one that the catalog lists as a
function of its arguments. What is not listed is refused, also what a later DuckDB adds.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saebench.core.errors import UserError

if TYPE_CHECKING:
    import duckdb

LONGEST_QUERY = 20_000
KINDS = "SELECT, WITH, DESCRIBE, SHOW or SUMMARIZE"
TABLE_FUNCTIONS = {
    "range", "generate_series", "unnest", "repeat", "json_each", "json_tree", "duckdb_columns",
    "duckdb_tables", "duckdb_functions", "pragma_table_info", "pragma_storage_info",
}  # fmt: skip
"""Table functions that read only the store's tables, or nothing."""
CATALOG = {"duckdb_columns", "duckdb_tables", "information_schema.columns", "information_schema.tables"}
"""Views of the catalog that name tables and columns, without paths or settings."""
SHOWN = {"tables", "databases", "schemas", "__show_tables_expanded"}
"""What SHOW lists: names of tables and of attached files' aliases."""
CHANGING_FUNCTIONS = {
    "random", "uuid", "uuidv4", "uuidv7", "gen_random_uuid", "error", "now", "today", "current_date",
    "current_localtime", "current_localtimestamp", "get_current_time", "get_current_timestamp",
    "transaction_timestamp", "current_database", "current_schema", "current_schemas",
}  # fmt: skip
"""Functions that the catalog does not list as consistent, because they depend on chance, time or the search
path. They read nothing outside the store."""
SYNTAX = {"unnest", "unlist"}
"""Functions that are known to the binder only."""
SQL_AS_TEXT = {"json_serialize_plan"}
"""Consistent functions that bind a query which they are given as text, where it is not checked."""
_NODES = {
    "SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE", "BASE_TABLE", "SUBQUERY", "JOIN",
    "TABLE_FUNCTION", "EXPRESSION_LIST", "EMPTY", "PIVOT", "SHOW_REF", "LIMIT_MODIFIER",
    "LIMIT_PERCENT_MODIFIER", "ORDER_MODIFIER", "DISTINCT_MODIFIER", "ORDER_DEFAULT", "ASCENDING",
    "DESCENDING",
}  # fmt: skip
_EXPRESSIONS = {
    "BETWEEN", "CASE", "CAST", "COLLATE", "COLUMN_REF", "COMPARISON", "CONJUNCTION", "CONSTANT", "DEFAULT",
    "FUNCTION", "LAMBDA", "LAMBDA_REF", "OPERATOR", "PARAMETER", "POSITIONAL_REFERENCE", "STAR", "SUBQUERY",
    "TYPE", "WINDOW",
}  # fmt: skip


@dataclass(frozen=True)
class SqlRules:
    """What the queries of one connection may name; all names are in lower case.

    Attributes:
        tables: the store's tables, with and without their file and schema ('feature', 'sae.main.feature').
        functions: functions of their arguments.
        reserved: names of DuckDB's own views, which no WITH may define: they would be found outside of it.
    """

    tables: frozenset[str] = frozenset()
    functions: frozenset[str] = frozenset()
    reserved: frozenset[str] = frozenset()

    @classmethod
    def of(cls, connection: duckdb.DuckDBPyConnection) -> SqlRules:
        """The rules for a connection to which all files of the store are attached."""
        tables = set(CATALOG) | {f"system.{view}" for view in CATALOG}
        listed = (
            "SELECT DISTINCT database_name, schema_name, table_name FROM duckdb_tables() WHERE NOT internal"
        )
        for file, schema, table in _lower(connection, listed):
            tables |= {table, f"{schema}.{table}", f"{file}.{table}", f"{file}.{schema}.{table}"}
        views = "SELECT DISTINCT view_name FROM duckdb_views() WHERE schema_name <> 'information_schema'"
        reserved = {name for (name,) in _lower(connection, views)}
        return cls(frozenset(tables), frozenset(_functions(connection)), frozenset(reserved))

    def question(self, connection: duckdb.DuckDBPyConnection, query: str) -> duckdb.Statement:
        """The one statement of ``query``.

        Raises:
            UserError: it is not one question, or names what it may not.
            duckdb.Error: it is not SQL.
        """
        import duckdb

        if len(query) > LONGEST_QUERY:
            raise UserError(f"the query has {len(query):,} characters; it may have {LONGEST_QUERY:,} at most")
        try:
            query.encode()
        except UnicodeEncodeError:
            raise UserError("the query holds half a character (a lone surrogate); take it out") from None
        statements = connection.extract_statements(query)
        if len(statements) != 1:
            what = "holds no statement" if not statements else f"holds {len(statements)} statements"
            raise UserError(f"the query {what}; write one {KINDS}")
        if statements[0].type != duckdb.StatementType.SELECT:
            kind = str(statements[0].type).rpartition(".")[2]
            raise UserError(f"a store answers questions only, and {kind} is none; write {KINDS}")
        parsed = _parsed(connection, query)
        if parsed.get("error"):
            raise UserError(f"the query cannot be checked ({parsed.get('error_message')}); write {KINDS}")
        self._check(list(_nodes(parsed)))
        return statements[0]

    def _check(self, nodes: list[dict[str, Any]]) -> None:
        defined = {name.lower() for node in nodes for name in _defined(node)}
        if wrong := sorted(defined & self.reserved):
            raise UserError(
                f"WITH cannot define {wrong[0]!r}, which is a name of DuckDB; choose another name"
            )
        tables = self.tables | defined | {f"recurring.{name}" for name in defined}
        for node in nodes:
            kind = str(node.get("type"))
            if "class" not in node and kind not in _NODES and kind.endswith("_QUERY_NODE"):
                verb = kind.removesuffix("_QUERY_NODE")
                raise UserError(f"a store answers questions only, and {verb} is none; write {KINDS}")
            if node.get("class", kind) not in (_EXPRESSIONS if "class" in node else _NODES):
                raise UserError(f"the query cannot be checked (it has a part {kind}); write {KINDS}")
            if kind == "TABLE_FUNCTION":
                _require(node["function"]["function_name"], TABLE_FUNCTIONS, "table function")
            elif node.get("class") in ("FUNCTION", "WINDOW") and not node.get("is_table_function"):
                _require(node["function_name"], self.functions, "function")
            elif kind == "BASE_TABLE" or (kind == "SHOW_REF" and node.get("show_type") == "SHOW"):
                _require_table(".".join(node["qualified_name"]["path"]), tables)
            elif kind == "SHOW_REF" and node.get("show_type") == "SHOW_SPECIAL":
                _require_table(node["table_name"].strip('"'), SHOWN)


def _require(name: str, known: set[str] | frozenset[str], what: str) -> None:
    if name.lower() not in known:
        raise UserError(f"the {what} {name!r} is not for stores; {_offered(name, known)}")


def _require_table(name: str, known: set[str] | frozenset[str]) -> None:
    if name.lower() not in known:
        raise UserError(f"the store has no table {name!r}; {_offered(name, known)}")


def _offered(name: str, known: set[str] | frozenset[str]) -> str:
    close = difflib.get_close_matches(name.lower(), sorted(known), n=1, cutoff=0.8)
    return f"did you mean {close[0]}?" if close else "SHOW ALL TABLES lists what can be queried"


def _defined(node: dict[str, Any]) -> list[str]:
    """The names that WITH gives in ``node``."""
    return [entry["key"] for entry in (node.get("cte_map") or {}).get("map") or ()]


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """The parts of a parsed query. The call inside a table function is marked; that is judged by name."""
    waiting = [tree]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            if part.get("type") == "TABLE_FUNCTION":
                part["function"]["is_table_function"] = True
            if isinstance(part.get("type"), str) and "kind" not in part:
                yield part
            waiting += part.values()


def _functions(connection: duckdb.DuckDBPyConnection) -> set[str]:
    """Functions whose result depends on their arguments only, and those that are made of such ones."""
    consistent = (
        "SELECT function_name FROM duckdb_functions() "
        "WHERE function_type IN ('scalar', 'aggregate', 'window') "
        "GROUP BY ALL HAVING bool_and(internal AND stability = 'CONSISTENT')"
    )
    known = {name for (name,) in _lower(connection, consistent) if not name.startswith("__internal")}
    known = (known | CHANGING_FUNCTIONS | SYNTAX) - SQL_AS_TEXT
    macros = (
        "SELECT function_name, bool_and(internal), list(json_serialize_sql('SELECT ' || macro_definition)) "
        "FROM duckdb_functions() WHERE function_type = 'macro' GROUP BY ALL"
    )
    waiting = {}
    for name, internal, definitions in connection.execute(macros).fetchall():
        nodes = [node for definition in definitions for node in _nodes(json.loads(definition))]
        if not internal or any(node["type"] in ("BASE_TABLE", "TABLE_FUNCTION") for node in nodes):
            known.discard(name.lower())
        else:
            waiting[name.lower()] = {
                n["function_name"].lower() for n in nodes if n.get("class") == "FUNCTION"
            }
    while made := {name for name, used in waiting.items() if used <= known} - known:
        known |= made
    return known


def _lower(connection: duckdb.DuckDBPyConnection, query: str) -> list[tuple[str, ...]]:
    return [tuple(str(name).lower() for name in row) for row in connection.execute(query).fetchall()]


def _parsed(connection: duckdb.DuckDBPyConnection, query: str) -> dict[str, Any]:
    """DuckDB's parse of ``query``, or its error."""
    text = connection.execute("SELECT json_serialize_sql(?)", [query]).fetchall()[0][0]
    try:
        parsed: dict[str, Any] = json.loads(text)
    except RecursionError:
        raise UserError("the query is nested too deeply; write it with fewer parentheses") from None
    return parsed
