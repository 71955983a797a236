"""``saebench store rebuild``: compute the tables of a store again from its activations, without cache or SAE.

Tables that derive from the act table and the text are computed again. Directions, logits, the run's metrics
and the index by context are copied. This converts a store of format 1 to format 2. Encoder norms with their
neighbors and the kurtosis of logits are not in format 1, so they stay empty.

Shapes: C contexts, T positions, X tokens of all contexts, N rows of the cache, S activations.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saebench.core.errors import UserError
from saebench.core.files import directory_lock, require_disk
from saebench.sources.modality import TEXT, UNIT
from saebench.store import publish, schema, tables
from saebench.store.corpus import Corpus, chunks
from saebench.store.database import open_reader, quoted, read_meta, sentence_for_duckdb_errors, tables_of
from saebench.store.extras import keep_extras
from saebench.store.sorted_spill import Activations, ranges
from saebench.store.tables import (
    STATIC_COLUMNS,
    Build,
    StaticData,
    TableOptions,
    left_out_tables,
    missing_tables,
    write_sae_file,
)
from saebench.store.textfile import write_text_file

if TYPE_CHECKING:
    import duckdb

MOST_TEXT = 1 << 20
"""Number of tokens of contexts that are read at once."""


def rebuild_store(path: str | Path, *, quiet: bool = False) -> publish.Manifest:
    """Compute the tables of all SAEs of a store again, and publish a generation after each SAE.

    Raises:
        UserError: there is no store, it is damaged or of a newer format, or it is of an older format and its
            text file does not tell which tokens the cache kept.
    """
    path = Path(path)
    manifest = publish.read_manifest(path)
    with directory_lock(path, what="the feature store"):
        for name in [sae.name for sae in manifest.saes]:
            current, building = publish.begin(path)
            old = current.sae(name)
            require_disk(path, 2 * old.file.bytes, what="rebuilding")
            try:
                with sentence_for_duckdb_errors(building):
                    stored, text = _rebuild(path, current, old, building, quiet=quiet)
                    stored = keep_extras(path, current, building, stored)
                manifest = publish.publish(path, current, [stored], text)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    return manifest


class StoredText(Corpus):
    """The rows of the cache that a store was made from, read from its text file.

    Without a text file it has the number of rows only.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, meta: dict[str, Any], scratch: Path) -> None:
        self.n_rows, self.n_contexts = meta["n_tokens"], meta["n_contexts"]
        self.has_units = bool(self.n_contexts)
        self.modality = meta.get("modality", TEXT.name if self.has_units else UNIT.name)
        self.has_text = self.has_units and self.modality == TEXT.name
        self.ctx_len = 0
        if not self.has_units:
            return
        if not self.has_text:
            self._fill_units(connection, meta["ctx_len"])
            return
        longest = _numbers(connection, "SELECT max(n_tokens) FROM txt.context")[0]
        self.ctx_len = meta.get("ctx_len") or longest
        self.vocab = [
            row for (row,) in connection.execute("SELECT bytes FROM txt.token ORDER BY token").fetchall()
        ]
        rows = connection.execute("SELECT label FROM txt.document ORDER BY doc").fetchall()
        self.labels = [label or "" for (label,) in rows]
        scratch.mkdir()

        def array(name: str, shape: tuple[int, ...]) -> Any:
            """An array on disk, so that memory does not grow with the text."""
            return np.lib.format.open_memmap(scratch / f"{name}.npy", "w+", np.int32, shape)

        self.context_tokens = array("context_tokens", (self.n_contexts, self.ctx_len))
        self.context_len = array("context_len", (self.n_contexts,))
        self.ctx, self.pos, self.doc, self.tokens = (
            array(name, (self.n_rows,)) for name in ("ctx", "pos", "doc", "tokens")
        )
        self.row_of_place = array("row_of_place", (self.n_contexts * self.ctx_len,))
        self._fill(connection)

    def _fill_units(self, connection: duckdb.DuckDBPyConnection, ctx_len: int) -> None:
        """Rows and units of another modality than text, without the user's columns, which are not needed."""
        found = connection.execute("SELECT n_positions, kept FROM txt.unit ORDER BY ctx").fetchnumpy()
        self.ctx_len, self.context_len = ctx_len, found["n_positions"].astype(np.int32)
        length_C = self.context_len.astype(np.int64)
        ctx_X = np.repeat(np.arange(self.n_contexts), length_C)
        pos_X = np.arange(len(ctx_X)) - np.repeat(np.cumsum(length_C) - length_C, length_C)
        kept_X = np.concatenate(found["kept"]).astype(bool)
        self.ctx, self.pos = ctx_X[kept_X].astype(np.int32), pos_X[kept_X].astype(np.int32)
        self.row_of_place = np.zeros(self.n_contexts * ctx_len, dtype=np.int64)
        self.row_of_place[self.place(np.arange(self.n_rows))] = np.arange(self.n_rows)

    def _fill(self, connection: duckdb.DuckDBPyConnection) -> None:
        kept, skipped = "kept", 0
        columns = "SELECT column_name FROM duckdb_columns() WHERE table_name = 'context'"
        if ("kept",) not in connection.execute(columns).fetchall():
            kept, skipped = "tokens", _skipped(connection, self.n_rows)
        done = 0
        for contexts in chunks(self.n_contexts, max(1, MOST_TEXT // self.ctx_len)):
            found = connection.execute(
                f"SELECT n_tokens, tokens, docs, {kept} AS kept FROM txt.context WHERE ctx BETWEEN ? AND ? "
                "ORDER BY ctx",
                [contexts.start, contexts.stop - 1],
            ).fetchnumpy()
            length_C = found["n_tokens"].astype(np.int64)
            ctx_X = np.repeat(np.arange(contexts.start, contexts.stop), length_C)
            pos_X = np.arange(len(ctx_X)) - np.repeat(np.cumsum(length_C) - length_C, length_C)
            token_X, doc_X, kept_X = (np.concatenate(found[name]) for name in ("tokens", "docs", "kept"))
            self.context_len[contexts] = length_C
            self.context_tokens[ctx_X, pos_X] = token_X
            at_X = kept_X.astype(bool) if kept == "kept" else pos_X >= skipped
            rows = slice(done, done + int(at_X.sum()))
            self.ctx[rows], self.pos[rows] = ctx_X[at_X], pos_X[at_X]
            self.doc[rows], self.tokens[rows] = doc_X[at_X], token_X[at_X]
            self.row_of_place[self.place(np.arange(rows.start, rows.stop))] = np.arange(rows.start, rows.stop)
            done = rows.stop
        assert done == self.n_rows, (done, self.n_rows)


def _skipped(connection: duckdb.DuckDBPyConnection, n_rows: int) -> int:
    """How many tokens at the start of each context have no row, for a text file that does not list them."""
    for skipped in (0, 1):
        counted = (
            f"SELECT token, count(*) AS m FROM (SELECT unnest(tokens[{skipped + 1}:]) AS token "
            "FROM txt.context) GROUP BY token"
        )
        wrong = (
            f"SELECT count(*) FROM txt.token LEFT JOIN ({counted}) USING (token) WHERE n <> coalesce(m, 0)"
        )
        if _numbers(connection, wrong) == (0,):
            return skipped
    raise UserError(
        "the store's text file has an older format that does not tell which tokens the cache kept; "
        "run saebench index again"
    )


def _rebuild(
    store: Path, current: publish.Manifest, old: publish.StoredSae, building: Path, *, quiet: bool
) -> tuple[publish.StoredSae, publish.StoredFile | None]:
    text = current.texts[old.text] if old.text else None
    for file in (old.file, *([text] if text else [])):
        if not publish.is_intact(store, file):
            raise UserError(
                f"{store / file.path} is damaged, so its tables cannot be computed again; "
                "run saebench index again"
            )
    with open_reader(store / old.file.path, store / text.path if text else None) as connection:
        meta = read_meta(connection)
        corpus = StoredText(connection, meta, building / "text")
        key, new_text = old.text, None
        if text and read_meta(connection, "txt")["format_version"] != schema.FORMAT_VERSION:
            key = corpus.hash
            if key == old.text or key not in current.texts:
                file_name = building / f"text-{key[:12]}.duckdb"
                write_text_file(file_name, corpus, name=meta["text"])
                new_text = publish.describe(file_name)
        present = tables_of(connection, "sae")
        has_index, has_metrics = "act_by_ctx" in present, "train_metric" in present
        meta |= {
            "format_version": schema.FORMAT_VERSION,
            "ctx_len": corpus.ctx_len,
            "missing": missing_tables(corpus, meta["missing"].get("logit")),
            "left_out": left_out_tables(metrics=has_metrics, context_index=has_index),
        }

        def copy_index(new: duckdb.DuckDBPyConnection) -> None:
            new.execute(f"ATTACH {quoted(store / old.file.path)} AS old (READ_ONLY)")
            new.execute("INSERT INTO act_by_ctx SELECT * FROM old.act_by_ctx")
            new.execute("DETACH old")

        build = Build(
            corpus=corpus,
            d_sae=meta["d_sae"],
            n_activations=meta["n_activations"],
            groups=_groups(connection, corpus, meta["d_sae"]),
            static=_static_data(connection, present, meta["d_sae"]),
            options=TableOptions(
                examples=meta["examples"], window=meta["window"], seed=meta["seed"], quiet=quiet
            ),
            context_index=copy_index if has_index else None,
        )
        path = building / Path(old.file.path).name
        write_sae_file(path, build, meta)
    shutil.rmtree(building / "text", ignore_errors=True)
    return dataclasses.replace(old, file=publish.describe(path), text=key), new_text


def _groups(connection: duckdb.DuckDBPyConnection, corpus: StoredText, d_sae: int) -> Iterator[Activations]:
    """All activations, read from the act table."""
    counts_M = np.zeros(d_sae, dtype=np.int64)
    counted = connection.execute("SELECT feature, count(*) AS n FROM sae.act GROUP BY feature").fetchnumpy()
    counts_M[counted["feature"]] = counted["n"]
    for first, stop in ranges(counts_M, tables.GROUP_SIZE, tables.GROUP_LATENTS):
        found = connection.execute(
            "SELECT feature, ctx, pos, value FROM sae.act WHERE feature BETWEEN ? AND ?", [first, stop - 1]
        ).fetchnumpy()
        row_S = found["ctx"].astype(np.int64)
        if corpus.has_units:
            row_S = corpus.row_of_place[row_S * corpus.ctx_len + found["pos"]].astype(np.int64)
        yield Activations(
            first, stop - first, found["feature"].astype(np.int64) - first, row_S, found["value"]
        )


def _static_data(connection: duckdb.DuckDBPyConnection, present: set[str], d_sae: int) -> StaticData:
    """Directions, logits and metrics, as the old file has them."""
    query = "SELECT column_name FROM duckdb_columns() WHERE database_name = 'sae' AND table_name = ?"
    known = {name for (name,) in connection.execute(query, ["feature"]).fetchall()}
    columns: dict[str, Any] = dict.fromkeys(STATIC_COLUMNS, [None] * d_sae)
    for name in known & set(STATIC_COLUMNS):
        rows = connection.execute(f"SELECT {name} FROM sae.feature ORDER BY feature").fetchall()
        columns[name] = [value for (value,) in rows]
    copied = []
    if {"kind"} <= {name for (name,) in connection.execute(query, ["neighbor"]).fetchall()}:
        copied.append((schema.NEIGHBOR, "SELECT * FROM sae.neighbor WHERE kind < 2"))
    else:
        copied.append(
            (
                schema.NEIGHBOR,
                "SELECT feature, 0 AS kind, rank, other, cosine AS score, NULL AS n_both FROM sae.neighbor",
            )
        )
    for table in (schema.LOGIT, schema.TRAIN_METRIC):
        if table.name in present:
            copied.append((table, f"SELECT * FROM sae.{table.name}"))
    if "logit" in present and "logit_max" not in known:
        best = "SELECT value FROM sae.logit WHERE sign = 1 AND rank = 0 ORDER BY feature"
        columns["logit_max"] = [value for (value,) in connection.execute(best).fetchall()]
    return StaticData(columns, [(table, _arrow(connection, rows)) for table, rows in copied])


def _arrow(connection: duckdb.DuckDBPyConnection, query: str) -> dict[str, Any]:
    table = connection.sql(query).to_arrow_table()
    return {name: table.column(name) for name in table.column_names}


def _numbers(connection: duckdb.DuckDBPyConnection, query: str) -> tuple[Any, ...]:
    row: tuple[Any, ...] = connection.execute(query).fetchall()[0]
    return row
