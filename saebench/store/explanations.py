"""Explanations in a store: how the extra is written, and the questions that are asked of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.core.errors import UserError
from saebench.store.reader import StoreReader
from saebench.store.schema import EXPL_ITEM, EXPL_SCORE, EXPLANATION, Table, nearest

if TYPE_CHECKING:
    import duckdb
    import pandas as pd

EXTRA = "explanations"
KEY = ("feature", "provider", "model")
TABLES = (EXPLANATION, EXPL_SCORE, EXPL_ITEM)
MAIN = ("rule", "detection")
"""The scorers by which explanations are ranked."""


class ExplanationReader(StoreReader):
    """The part of a FeatureStore about explanations."""

    def explanations(self, feature: int) -> pd.DataFrame:
        """Its explanations, the best first.

        Columns provider, model, text, score, ci_lo, ci_hi (of rules: F1 on the documents that were not used
        to find them; of others: balanced accuracy in detection; with 95% intervals), status (ok, few, failed,
        refused or unparsed), reason (why there is none), rule (JSON, for rules), n_train, n_test, tokens,
        prompt. Empty before `saebench explain`.

        Raises:
            UserError: no such feature.
        """
        own = ", ".join(f"e.{name}" for name in EXPLANATION.names[1:])
        return self._explained(
            f"SELECT {own}, s.value AS score, s.ci_lo, s.ci_hi FROM explanations.explanation e LEFT JOIN "
            "(FROM explanations.expl_score WHERE feature = ? AND list_contains(?, scorer)) s "
            "USING (feature, provider, model) WHERE e.feature = ? ORDER BY "
            f"{_comparable('s')} DESC NULLS LAST, provider, model",
            [self._known(feature), list(MAIN), self._known(feature)],
            [*EXPLANATION.names[1:], "score", "ci_lo", "ci_hi"],
        )

    def explanation_scores(self, feature: int) -> pd.DataFrame:
        """Every score of its explanations, baselines too: the columns of the expl_score table.

        ``scorer`` is 'rule', or what it is to be compared with: 'best token', the one token that predicts
        best, and 'shuffled', the rule of another feature; of language models 'detection' and 'fuzzing'.
        """
        return self._explained(
            f"SELECT {', '.join(EXPL_SCORE.names[1:])} FROM explanations.expl_score WHERE feature = ? "
            "ORDER BY provider, model, scorer <> 'rule', scorer",
            [self._known(feature)],
            EXPL_SCORE.names[1:],
        )

    def explanation_items(self, feature: int) -> pd.DataFrame:
        """Every question that a language model was asked to score an explanation, and what it answered."""
        return self._explained(
            f"SELECT {', '.join(EXPL_ITEM.names[1:])} FROM explanations.expl_item WHERE feature = ? "
            "ORDER BY provider, model, scorer, rank",
            [self._known(feature)],
            EXPL_ITEM.names[1:],
        )

    def explained_by(self) -> pd.DataFrame:
        """Who explained features of this SAE, a row for each provider and model.

        Columns provider, model, prompt, n (features), n_ok (with a text), tokens (of the language model).

        >>> store.explained_by().columns.tolist()
        ['provider', 'model', 'prompt', 'n', 'n_ok', 'tokens']
        """
        return self._explained(
            "SELECT provider, model, max(prompt) AS prompt, count(*) AS n, "
            "count(*) FILTER (status = 'ok') AS n_ok, sum(tokens)::BIGINT AS tokens "
            "FROM explanations.explanation GROUP BY provider, model ORDER BY n DESC, provider, model",
            [],
            ["provider", "model", "prompt", "n", "n_ok", "tokens"],
        )

    def explanation_outcomes(self, provider: str, model: str = "") -> pd.DataFrame:
        """What became of one provider's attempts: status, reason, n, feature (one of them); the most first.

        Numbers in a reason are left out, so that the same cause is one row.
        """
        return self._explained(
            "SELECT status, regexp_replace(coalesce(reason, ''), '\\d[\\d,.]*', '…', 'g') AS reason, "
            "count(*) AS n, min(feature) AS feature FROM explanations.explanation "
            "WHERE provider = ? AND model = ? GROUP BY ALL ORDER BY n DESC, status, reason",
            [provider, model],
            ["status", "reason", "n", "feature"],
        )

    def all_explanation_scores(self, provider: str, model: str = "") -> pd.DataFrame:
        """Scores of all explanations of one provider, baselines too: feature, scorer, value, precision,
        recall; those without a value are left out."""
        columns = ["feature", "scorer", "value", "precision", "recall"]
        return self._explained(
            f"SELECT {', '.join(columns)} FROM explanations.expl_score "
            "WHERE provider = ? AND model = ? AND value IS NOT NULL ORDER BY feature, scorer",
            [provider, model],
            columns,
        )

    def all_explanations(
        self,
        provider: str,
        model: str = "",
        *,
        order_by: str = "score",
        descending: bool = True,
        limit: int | None = None,
        offset: int = 0,
    ) -> pd.DataFrame:
        """Explanations of one provider, a row a feature, those without a score last.

        Columns feature, text, status, reason, score, ci_lo, ci_hi, precision, recall, n_train, n_test.

        Raises:
            UserError: another column to order by.
        """
        columns = [
            "feature", "text", "status", "reason", "score", "ci_lo", "ci_hi", "precision", "recall",
            "n_train", "n_test",
        ]  # fmt: skip
        if order_by not in columns:
            raise UserError(f"{order_by!r} is no column of explanations; {nearest(order_by, columns)}")
        direction = "DESC" if descending else "ASC"
        return self._explained(
            "SELECT e.feature, e.text, e.status, e.reason, s.value AS score, s.ci_lo, s.ci_hi, s.precision, "
            "s.recall, e.n_train, e.n_test FROM explanations.explanation e LEFT JOIN "
            "(FROM explanations.expl_score WHERE list_contains(?, scorer)) s "
            "USING (feature, provider, model) WHERE e.provider = ? AND e.model = ? "
            f"ORDER BY {order_by} {direction} NULLS LAST, feature LIMIT ? OFFSET ?",
            [list(MAIN), provider, model, 2**62 if limit is None else limit, offset],
            columns,
        )

    def _explained(self, query: str, values: list[object], columns: list[str]) -> pd.DataFrame:
        if EXTRA in self._extras:
            return self._frame(query, values)
        import pandas as pd

        return pd.DataFrame(columns=columns)


def replace_explanations(
    store: Path,
    sae: str,
    connection: duckdb.DuckDBPyConnection,
    rows: Mapping[str, Mapping[str, list[Any]]],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Fill the tables in ``connection`` with the store's explanations, those in ``rows`` replaced or added.

    Returns the meta of the extra: for each provider and model the settings it was last asked with.
    """
    from saebench.store.database import read_meta
    from saebench.store.query import open_store

    old: dict[str, Any] = {}
    made: dict[str, Any] = {}
    with open_store(store, sae) as opened:
        if EXTRA in opened._extras:
            old = {table.name: opened.arrow(f"FROM explanations.{table.name}") for table in TABLES}
            with opened._cursor() as cursor:
                made = read_meta(cursor, EXTRA).get("made_with", {})
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
        f"max(score) FROM (SELECT e.feature, e.provider, e.model, text, {_comparable('s')} AS score FROM "
        "explanation e JOIN expl_score s USING (feature, provider, model) WHERE list_contains(?, scorer) AND "
        "value IS NOT NULL) GROUP BY feature ORDER BY feature",
        [list(MAIN)],
    )
    whose = f"{settings['provider']} {settings.get('model') or ''}".strip()
    return {"made_with": made | {whose: dict(settings)}}


def _comparable(scores: str) -> str:
    """SQL for the score by which explanations of any kind are ranked: 0 is worth nothing, 1 is perfect."""
    return f"CASE WHEN {scores}.scorer = 'detection' THEN 2 * {scores}.value - 1 ELSE {scores}.value END"


def _arrow(table: Table, columns: Mapping[str, list[Any]]) -> Any:
    import pyarrow

    kinds = {
        "UINTEGER": pyarrow.uint32(), "UINTEGER[]": pyarrow.list_(pyarrow.uint32()),
        "BIGINT": pyarrow.int64(), "DOUBLE": pyarrow.float64(), "VARCHAR": pyarrow.string(),
        "BOOLEAN": pyarrow.bool_(),
    }  # fmt: skip
    return pyarrow.table({c.name: pyarrow.array(columns[c.name], type=kinds[c.type]) for c in table.columns})


def summary(store: ExplanationReader, provider: str, model: str, *, shown: int) -> dict[str, Any]:
    """Of one provider and model: how many have which status, why some are missing, how good the rest is.

    Keys: status (status -> features), reasons (rows status, n, reason; the most frequent ones), scores (rows
    scorer, n, mean, median), best (rows feature, explanation, explanation_score).
    """
    whose = [provider, model]
    own = "FROM explanations.explanation WHERE provider = ? AND model = ?"
    status = store._rows(f"SELECT status, count(*) {own} GROUP BY status ORDER BY status", whose)
    # Reasons of one kind differ in their numbers, so one of them stands for all of a status.
    reasons = store._frame(
        f"SELECT status, count(*) AS n, mode(reason ORDER BY feature) AS reason {own} AND reason IS NOT NULL "
        "GROUP BY status ORDER BY n DESC, status", whose)  # fmt: skip
    scores = store._frame(
        "SELECT scorer, count(value) AS n, avg(value) AS mean, median(value) AS median "
        "FROM explanations.expl_score WHERE provider = ? AND model = ? GROUP BY scorer "
        "ORDER BY mean DESC NULLS LAST, scorer", whose)  # fmt: skip
    best = store._frame(
        f"SELECT feature, text AS explanation, {_comparable('s')} AS explanation_score FROM "
        "explanations.explanation JOIN explanations.expl_score s USING (feature, provider, model) WHERE "
        "provider = ? AND model = ? AND list_contains(?, scorer) AND value IS NOT NULL "
        "ORDER BY explanation_score DESC, feature LIMIT ?", [*whose, list(MAIN), shown])  # fmt: skip
    found = {"reasons": reasons, "scores": scores, "best": best}
    rows = {name: frame.to_dict("records") for name, frame in found.items()}
    return {"status": dict(status), **rows}
