"""ExplanationReader: explanations of features, their scores and the answers they are computed from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saebench.core.errors import UserError
from saebench.store.connection import MOST_ROWS, StoreConnection
from saebench.store.explanation_tables import EXTRA, RANKING_SCORERS, comparable_score
from saebench.store.schema import EXPL_ITEM, EXPL_SCORE, EXPLANATION, nearest

if TYPE_CHECKING:
    import pandas as pd


class ExplanationReader:
    """Owns the tables of the extra ``explanations``."""

    def __init__(self, connection: StoreConnection) -> None:
        self._connection = connection

    def explanations(self, feature: int) -> pd.DataFrame:
        """The explanations of a feature, best first. Empty before `saebench explain`.

        Columns provider, model, text, score, ci_lo, ci_hi (for rules, F1 on documents that were not used to
        find them; for language models, balanced accuracy of detection; both with a 95% interval), status
        (ok, few, failed, refused or unparsed), reason (why there is no explanation), rule (JSON, for rules),
        n_train, n_test, tokens, prompt.

        Raises:
            UserError: no such feature.
        """
        feature = self._connection.require_feature(feature)
        own = ", ".join(f"e.{name}" for name in EXPLANATION.names[1:])
        return self._explained(
            f"SELECT {own}, s.value AS score, s.ci_lo, s.ci_hi FROM explanations.explanation e LEFT JOIN "
            "(FROM explanations.expl_score WHERE feature = ? AND list_contains(?, scorer)) s "
            "USING (feature, provider, model) WHERE e.feature = ? ORDER BY "
            f"{comparable_score('s')} DESC NULLS LAST, provider, model",
            [feature, list(RANKING_SCORERS), feature],
            [*EXPLANATION.names[1:], "score", "ci_lo", "ci_hi"],
        )

    def explanation_scores(self, feature: int) -> pd.DataFrame:
        """All scores of the explanations of a feature, baselines included: columns of the table expl_score.

        For rules, ``scorer`` is 'rule', or a baseline: 'best token', the single token that predicts best, or
        'shuffled', the rule of another feature. For language models it is 'detection' or 'fuzzing'.

        Raises:
            UserError: no such feature.
        """
        return self._explained(
            f"SELECT {', '.join(EXPL_SCORE.names[1:])} FROM explanations.expl_score WHERE feature = ? "
            "ORDER BY provider, model, scorer <> 'rule', scorer",
            [self._connection.require_feature(feature)],
            EXPL_SCORE.names[1:],
        )

    def explanation_items(self, feature: int) -> pd.DataFrame:
        """The questions that scored explanations of a feature and a language model's answers.

        Columns of the table expl_item, one row per question.

        Raises:
            UserError: no such feature.
        """
        return self._explained(
            f"SELECT {', '.join(EXPL_ITEM.names[1:])} FROM explanations.expl_item WHERE feature = ? "
            "ORDER BY provider, model, scorer, rank",
            [self._connection.require_feature(feature)],
            EXPL_ITEM.names[1:],
        )

    def explained_by(self) -> pd.DataFrame:
        """The providers and models that explained features of this SAE, one row each.

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
        """How often one provider and model gave which status and reason, most frequent first.

        Columns status, reason, n (features), feature (one of them). Numbers in a reason become …, so that
        reasons that differ only in numbers are one row.
        """
        return self._explained(
            "SELECT status, regexp_replace(coalesce(reason, ''), '\\d[\\d,.]*', '…', 'g') AS reason, "
            "count(*) AS n, min(feature) AS feature FROM explanations.explanation "
            "WHERE provider = ? AND model = ? GROUP BY ALL ORDER BY n DESC, status, reason",
            [provider, model],
            ["status", "reason", "n", "feature"],
        )

    def all_explanation_scores(self, provider: str, model: str = "") -> pd.DataFrame:
        """Scores of all explanations of one provider and model, baselines included.

        Columns feature, scorer, value, precision, recall; scores without a value are left out.
        """
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
        """Explanations of one provider and model, one row per feature; those without a score come last.

        Columns feature, text, status, reason, score, ci_lo, ci_hi, precision, recall, n_train, n_test.

        Raises:
            UserError: ``order_by`` is not one of these columns.
        """
        columns = "feature text status reason score ci_lo ci_hi precision recall n_train n_test".split()
        if order_by not in columns:
            raise UserError(f"{order_by!r} is not a column of explanations; {nearest(order_by, columns)}")
        direction = "DESC" if descending else "ASC"
        return self._explained(
            "SELECT e.feature, e.text, e.status, e.reason, s.value AS score, s.ci_lo, s.ci_hi, s.precision, "
            "s.recall, e.n_train, e.n_test FROM explanations.explanation e LEFT JOIN "
            "(FROM explanations.expl_score WHERE list_contains(?, scorer)) s "
            "USING (feature, provider, model) WHERE e.provider = ? AND e.model = ? "
            f"ORDER BY {order_by} {direction} NULLS LAST, feature LIMIT ? OFFSET ?",
            [list(RANKING_SCORERS), provider, model, MOST_ROWS if limit is None else limit, offset],
            columns,
        )

    def explanation_summary(self, provider: str, model: str = "", *, n_best: int = 5) -> dict[str, Any]:
        """How well one provider and model explained this SAE.

        Keys: status (status -> features), reasons (rows status, n, reason; the most frequent reason of each
        status), scores (rows scorer, n, mean, median), best (``n_best`` rows feature, explanation,
        explanation_score).

        Raises:
            UserError: a store without explanations.
        """
        connection = self._connection
        connection.require("explanation")
        values = [provider, model]
        chosen = "FROM explanations.explanation WHERE provider = ? AND model = ?"
        status = connection.rows(f"SELECT status, count(*) {chosen} GROUP BY status ORDER BY status", values)
        # Reasons of one status may differ in their numbers only, so one of them is given for all.
        reasons = connection.frame(
            f"SELECT status, count(*) AS n, mode(reason ORDER BY feature) AS reason {chosen} "
            "AND reason IS NOT NULL GROUP BY status ORDER BY n DESC, status",
            values,
        )
        scores = connection.frame(
            "SELECT scorer, count(value) AS n, avg(value) AS mean, median(value) AS median "
            "FROM explanations.expl_score WHERE provider = ? AND model = ? GROUP BY scorer "
            "ORDER BY mean DESC NULLS LAST, scorer",
            values,
        )
        best = connection.frame(
            f"SELECT feature, text AS explanation, {comparable_score('s')} AS explanation_score FROM "
            "explanations.explanation JOIN explanations.expl_score s USING (feature, provider, model) WHERE "
            "provider = ? AND model = ? AND list_contains(?, scorer) AND value IS NOT NULL "
            "ORDER BY explanation_score DESC, feature LIMIT ?",
            [*values, list(RANKING_SCORERS), n_best],
        )
        frames = {"reasons": reasons, "scores": scores, "best": best}
        return {"status": dict(status)} | {name: frame.to_dict("records") for name, frame in frames.items()}

    def _explained(self, query: str, values: list[object], columns: list[str]) -> pd.DataFrame:
        if EXTRA in self._connection.extras:
            return self._connection.frame(query, values)
        import pandas as pd

        return pd.DataFrame(columns=columns)
