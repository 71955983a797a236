"""Questions to all SAEs of a store at once, and a person's own SQL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from saebench.core.errors import UserError
from saebench.store import publish
from saebench.store.drilldown import DrillDown
from saebench.store.schema import nearest
from saebench.store.sql import SqlConsole

if TYPE_CHECKING:
    import pandas as pd

SCORES = ("explained_variance", "ce_loss_score", "kl")
"""What is taken from the evaluation that was indexed with an SAE."""


class CrossSaeQueries(DrillDown):
    """The part of a FeatureStore that looks beyond its own SAE."""

    _opened_console: SqlConsole | None = None

    def beside(self, sae: str) -> Self:
        """Another SAE of the same generation, to be closed by itself.

        Raises:
            UserError: no such SAE, or a damaged file.
        """
        return type(self)(self.path, self._manifest, sae, publish.hold(self.path, self._manifest))

    def compare(self) -> pd.DataFrame:
        """All SAEs of the store, a row each.

        Columns name, sae, d_in, d_sae, k, hook_name, text, n_tokens, l0 (activations a token), dead and dense
        (shares of the features), median_density (of those that fire), explained_variance, ce_loss_score and
        kl (from the run's evaluation, if it was indexed with one), bytes (of its files, without the text's),
        sae_hash (of its weights).

        >>> store.compare()["name"].tolist() == store.saes
        True
        """
        import pandas as pd

        return pd.DataFrame([self._summary(name) for name in self.saes])

    def _summary(self, name: str) -> dict[str, Any]:
        if name != self.sae:
            with self.beside(name) as other:
                return other._summary(name)
        meta, stored = self._meta, self._manifest.sae(self.sae)
        query = "SELECT avg(dead::INT), avg(dense::INT), median(density) FILTER (NOT dead) FROM sae.feature"
        dead, dense, density = self._rows(query)[0]
        known = ("name", "sae", "d_in", "d_sae", "k", "hook_name", "text", "n_tokens")
        evaluation = meta.get("eval") or {}
        return {
            **{key: meta[key] for key in known}, "l0": meta["n_activations"] / meta["n_tokens"],
            "dead": dead, "dense": dense, "median_density": density,
            **{score: evaluation.get(score) for score in SCORES},
            "bytes": stored.file.bytes + sum(file.bytes for file in stored.extras.values()),
            "sae_hash": meta["sae_hash"],
        }  # fmt: skip

    def same_firings(self, feature: int, sae: str, *, limit: int = 20) -> pd.DataFrame:
        """Features of another SAE of the store that fire where this one does, the most alike first.

        Columns feature (of ``sae``), n_both (tokens on which both fire), p_other_given_this,
        p_this_given_other, jaccard (tokens on which both fire / either fires), top_token. Reads all
        activations of the other SAE.

        >>> int(store.same_firings(3, store.sae)["feature"][0])
        3

        Raises:
            UserError: no such feature or SAE, one that was indexed over other text, or the time limit was
                reached.
        """
        if sae not in self.saes:
            raise UserError(f"{sae!r} is not an SAE of the store {self.path}; {nearest(sae, self.saes)}")
        self._require_same_rows(sae)
        other = "sae" if sae == self.sae else f"sae{self.saes.index(sae) + 1}"
        found = self._console.ask(
            "WITH this AS (SELECT ctx, pos FROM sae.act WHERE feature = $1), "
            f"both_fire AS (SELECT feature, count(*) AS n_both FROM {other}.act SEMI JOIN this "
            "USING (ctx, pos) GROUP BY feature), own AS (SELECT count(*) AS n FROM this) "
            "SELECT feature, n_both, n_both / own.n AS p_other_given_this, n_both / n_act AS "
            "p_this_given_other, n_both / (own.n + n_act - n_both) AS jaccard, top_token "
            f"FROM both_fire JOIN {other}.feature USING (feature), own ORDER BY jaccard DESC, feature",
            [self._known(feature)], limit=limit, seconds=self.time_limit,
        )  # fmt: skip
        return found.astype({"feature": "int64"})

    def _require_same_rows(self, sae: str) -> None:
        own, other = self._manifest.sae(self.sae), self._manifest.sae(sae)
        same = own.text == other.text
        if same and own.text is None:
            with self.beside(sae) as opened:
                same = self._meta["cache_hash"] == opened._meta["cache_hash"]
        if not same:
            raise UserError(
                f"{self.sae!r} and {sae!r} were indexed over other text, so their firings cannot be "
                "compared; index both over one cache"
            )

    def sql(self, query: str, values: Sequence[object] = (), *, limit: int = 1000) -> pd.DataFrame:
        """The answer to one read-only SQL statement, ``limit`` rows at most.

        The tables of this SAE and of its text go by their names (``feature``, ``act``, ``token``, ...);
        ``sae1.feature``, ``sae2.feature``, ... are those of the store's other SAEs, in the order of
        ``saes``. ``SHOW ALL TABLES`` lists everything. ``.attrs["more"]`` of the result says whether there
        were more rows.

        >>> store.sql("SELECT count(*) AS n FROM feature WHERE n_act >= ?", [0])["n"].tolist()
        [24]

        Args:
            values: for the ``?`` in the query.

        Raises:
            UserError: it is not one SELECT, WITH, DESCRIBE, SHOW or SUMMARIZE, reaches for anything but the
                store's tables, is wrong, or took longer than ``time_limit``.
        """
        if limit < 0:
            raise UserError(f"limit is {limit}; it must be at least 0")
        return self._console.ask(query, values, limit=limit, seconds=self.time_limit)

    @property
    def _console(self) -> SqlConsole:
        with self._opening:
            if self._opened_console is None:
                self._opened_console = SqlConsole(self.path, self._manifest, self.sae)
            return self._opened_console

    def close(self) -> None:
        if self._opened_console is not None:
            self._opened_console.close()
        super().close()
