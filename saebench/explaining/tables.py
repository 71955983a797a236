"""Writes finished records into the tables of the extra ``explanations``, next to the existing explanations.

A record is a dict with the columns of the explanation table, and with ``scores`` and ``items``: lists of
dicts with the further columns of expl_score and expl_item.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.store import publish
from saebench.store.explanation_tables import KEY, replace_explanations
from saebench.store.extras import publish_extra
from saebench.store.schema import EXPL_ITEM, EXPL_SCORE, EXPLANATION, Table

if TYPE_CHECKING:
    import duckdb


def publish_records(
    store: Path,
    sae: str,
    made_from: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> publish.Manifest:
    """Publish ``records`` in a new generation; they replace those of the same feature, provider and model.

    ``settings``, with which they were made, are stored in the meta table of the extra.

    Raises:
        UserError: see publish_extra.
    """

    def build(connection: duckdb.DuckDBPyConnection) -> dict[str, Any]:
        return replace_explanations(store, sae, connection, rows_of(records), settings)

    return publish_extra(store, sae, "explanations", build, made_from=made_from)


def rows_of(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """Table -> column -> values."""
    explanations: list[Mapping[str, Any]] = []
    scores: list[Mapping[str, Any]] = []
    items: list[Mapping[str, Any]] = []
    for record in sorted(records, key=lambda record: int(record["feature"])):
        key = {name: record[name] for name in KEY}
        explanations.append(record)
        scores += [key | score for score in record["scores"]]
        items += [key | item for item in record["items"]]
    return {
        table.name: _columns(table, rows)
        for table, rows in ((EXPLANATION, explanations), (EXPL_SCORE, scores), (EXPL_ITEM, items))
    }


def _columns(table: Table, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in table.names}
