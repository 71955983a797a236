"""Export of each table of an SAE and of its text as a Parquet file, in the order of the store, with zstd."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saebench.store.query import FeatureStore

ROW_GROUP = 122_880
_NAME = re.compile(r"[a-z_][a-z0-9_]*")


def check(store: FeatureStore, features: list[int] | None) -> None:
    """Any store can be written."""


def write(store: FeatureStore, features: list[int] | None, directory: Path) -> tuple[str, ...]:
    """``TABLE.parquet`` for each table; with ``features`` only their rows, of tables that have a feature.

    The table meta of the text is ``txt_meta.parquet``.
    """
    import pyarrow.parquet

    left_out = []
    for alias, table, columns in _tables(store):
        query, values = f"SELECT * FROM {alias}.{table}", list[object]()
        if features is not None and "feature" in columns:
            query += " WHERE feature IN (SELECT unnest(?::UBIGINT[]))"
            values = [features]
        elif features is not None and "features" in columns:
            left_out.append(table)
            continue
        name = table if alias == "sae" or table != "meta" else f"{alias}_meta"
        with store.record_batches(query, values, rows=ROW_GROUP) as reader:
            path = directory / f"{name}.parquet"
            with pyarrow.parquet.ParquetWriter(path, reader.schema, compression="zstd") as writer:
                for batch in reader:
                    writer.write_batch(batch, row_group_size=ROW_GROUP)
    return (f"Without {', '.join(left_out)}, which are ordered by context.",) if left_out else ()


def _tables(store: FeatureStore) -> list[tuple[str, str, set[str]]]:
    """(file, table, columns) of the attached tables."""
    found = store.arrow(
        "SELECT database_name, table_name, list(column_name) FROM duckdb_columns() WHERE NOT internal "
        "AND database_name NOT IN ('memory', 'system', 'temp') GROUP BY ALL ORDER BY ALL"
    )
    return [
        (alias, table, set(columns))
        for alias, table, columns in zip(*(column.to_pylist() for column in found.columns), strict=True)
        if _NAME.fullmatch(alias) and _NAME.fullmatch(table)
    ]
