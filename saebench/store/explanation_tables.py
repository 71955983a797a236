"""The tables of the extra ``explanations``: their keys, how scores are ranked, and how they are written."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.store.connection import StoreConnection
from saebench.store.schema import EXPL_ITEM, EXPL_SCORE, EXPLANATION, Table

if TYPE_CHECKING:
    import duckdb

EXTRA = "explanations"
KEY = ("feature", "provider", "model")
TABLES = (EXPLANATION, EXPL_SCORE, EXPL_ITEM)
RANKING_SCORERS = ("rule", "detection")
"""The scorers by which explanations are ranked."""


def replace_explanations(
    store: Path,
    sae: str,
    connection: duckdb.DuckDBPyConnection,
    rows: Mapping[str, Mapping[str, list[Any]]],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Fill the tables in ``connection`` with the store's explanations; those in ``rows`` replace old ones.

    Args:
        connection: to a file with the empty tables of the extra.
        rows: table -> column -> values.
        settings: how ``rows`` were made.

    Returns:
        The metadata of the extra: for each provider and model the settings of its last run.
    """
    old: dict[str, Any] = {}
    made: dict[str, Any] = {}
    with contextlib.closing(StoreConnection.open(store, sae)) as opened:
        if EXTRA in opened.extras:
            old = {table.name: opened.arrow(f"FROM explanations.{table.name}") for table in TABLES}
            made = opened.read_meta(EXTRA).get("made_with", {})
    for table in TABLES:
        connection.register("_new", _arrow(table, rows[table.name]))
        connection.execute(f"CREATE TEMP TABLE new_{table.name} AS FROM _new")
        connection.unregister("_new")
    for table in TABLES:
        names, order = ", ".join(table.names), ", ".join(table.order)
        query = f"SELECT {names} FROM new_{table.name}"
        if old:
            connection.register("_old", old[table.name])
            query += f" UNION ALL SELECT {names} FROM _old ANTI JOIN new_explanation USING ({', '.join(KEY)})"
        connection.execute(f"INSERT INTO {table.name} SELECT {names} FROM ({query}) ORDER BY {order}")
        if old:
            connection.unregister("_old")
    connection.execute(
        "INSERT INTO explained SELECT feature, first(text ORDER BY score DESC, provider, model), "
        f"max(score) FROM (SELECT e.feature, e.provider, e.model, text, {comparable_score('s')} AS score "
        "FROM explanation e JOIN expl_score s USING (feature, provider, model) "
        "WHERE list_contains(?, scorer) AND value IS NOT NULL) GROUP BY feature ORDER BY feature",
        [list(RANKING_SCORERS)],
    )
    whose = f"{settings['provider']} {settings.get('model') or ''}".strip()
    return {"made_with": made | {whose: dict(settings)}}


def comparable_score(scores: str) -> str:
    """SQL for the score by which explanations of any kind are ranked: 0 is chance level, 1 is perfect."""
    return f"CASE WHEN {scores}.scorer = 'detection' THEN 2 * {scores}.value - 1 ELSE {scores}.value END"


def _arrow(table: Table, columns: Mapping[str, list[Any]]) -> Any:
    import pyarrow

    kinds = {
        "UINTEGER": pyarrow.uint32(),
        "UINTEGER[]": pyarrow.list_(pyarrow.uint32()),
        "BIGINT": pyarrow.int64(),
        "DOUBLE": pyarrow.float64(),
        "VARCHAR": pyarrow.string(),
        "BOOLEAN": pyarrow.bool_(),
    }
    return pyarrow.table({c.name: pyarrow.array(columns[c.name], type=kinds[c.type]) for c in table.columns})
