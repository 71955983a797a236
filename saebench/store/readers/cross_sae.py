"""CrossSaeReader: queries over all SAEs of a store, and a user's own SQL."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from saebench.core.errors import UserError
from saebench.store.connection import StoreConnection
from saebench.store.readers.sae import with_sites
from saebench.store.sql import SqlConsole

if TYPE_CHECKING:
    import pandas as pd

SCORES = ("explained_variance", "ce_loss_score", "kl")
"""Taken from the evaluation that was indexed with an SAE."""


class CrossSaeReader:
    """Opens the files of the store's other SAEs when they are needed."""

    def __init__(self, connection: StoreConnection) -> None:
        self._connection = connection
        self._opening = threading.Lock()
        self._opened_console: SqlConsole | None = None

    def compare(self) -> pd.DataFrame:
        """All SAEs of the store, one row each.

        Columns name, sae, d_in, d_sae, k, hook_name, text, n_tokens, l0 (activations per token), dead and
        dense (shares of the features), median_density (of those that fire), explained_variance,
        ce_loss_score and kl (from the run's evaluation, if it was indexed with one), bytes (of its files,
        without the text's), sae_hash (of its weights), reads and writes (names of sites, with commas between
        them; the same unless it is a transcoder).

        >>> store.compare()["name"].tolist() == store.saes
        True
        """
        import pandas as pd

        summaries = []
        for name in self._connection.saes:
            if name == self._connection.sae:
                summaries.append(_summary(self._connection))
                continue
            other = self._connection.beside(name)
            try:
                summaries.append(_summary(other))
            finally:
                other.close()
        return pd.DataFrame(summaries)

    def same_firings(self, feature: int, sae: str, *, limit: int = 20) -> pd.DataFrame:
        """Features of another SAE of the store that fire on the same tokens, most similar first.

        Columns feature (of ``sae``), n_both (tokens on which both fire), p_other_given_this,
        p_this_given_other, jaccard (tokens on which both fire / either fires), top_token. Reads all
        activations of the other SAE.

        >>> int(store.same_firings(3, store.sae)["feature"][0])
        3

        Raises:
            UserError: no such feature or SAE, one that was indexed over other text, or the time limit was
                reached.
        """
        connection = self._connection
        connection.require_sae(sae)
        self._require_same_text(sae)
        other = "sae" if sae == connection.sae else f"sae{connection.saes.index(sae) + 1}"
        found = self.console.ask(
            "WITH this AS (SELECT ctx, pos FROM sae.act WHERE feature = $1), "
            f"both_fire AS (SELECT feature, count(*) AS n_both FROM {other}.act SEMI JOIN this "
            "USING (ctx, pos) GROUP BY feature), own AS (SELECT count(*) AS n FROM this) "
            "SELECT feature, n_both, n_both / own.n AS p_other_given_this, n_both / n_act AS "
            "p_this_given_other, n_both / (own.n + n_act - n_both) AS jaccard, top_token "
            f"FROM both_fire JOIN {other}.feature USING (feature), own ORDER BY jaccard DESC, feature",
            [connection.require_feature(feature)],
            limit=limit,
            seconds=connection.time_limit,
        )
        return found.astype({"feature": "int64"})

    def _require_same_text(self, sae: str) -> None:
        manifest = self._connection.manifest
        own, other = manifest.sae(self._connection.sae), manifest.sae(sae)
        same = own.text == other.text
        if same and own.text is None:
            opened = self._connection.beside(sae)
            same = self._connection.meta["cache_hash"] == opened.meta["cache_hash"]
            opened.close()
        if not same:
            raise UserError(
                f"{self._connection.sae!r} and {sae!r} were indexed over other text, so their firings cannot "
                "be compared; index both over one cache"
            )

    def sql(self, query: str, values: Sequence[object] = (), *, limit: int = 1000) -> pd.DataFrame:
        """The answer to one read-only SQL statement, at most ``limit`` rows.

        The tables of this SAE and of its text are used by name (``feature``, ``act``, ``token``, ...);
        ``sae1.feature``, ``sae2.feature``, ... are those of the store's other SAEs, in the order of
        ``saes``. ``SHOW ALL TABLES`` lists everything. ``.attrs["more"]`` of the result says whether there
        were more rows.

        >>> found = store.sql("SELECT count(*) AS n FROM feature WHERE n_act >= ?", [0])
        >>> bool(found["n"][0] == len(store.features()))
        True

        Args:
            values: for the ``?`` in the query.

        Raises:
            UserError: it is not one SELECT, WITH, DESCRIBE, SHOW or SUMMARIZE, reads anything but the
                store's tables, is wrong, or took longer than ``time_limit``.
        """
        if limit < 0:
            raise UserError(f"limit is {limit}; it must be at least 0")
        return self.console.ask(query, values, limit=limit, seconds=self._connection.time_limit)

    @property
    def console(self) -> SqlConsole:
        with self._opening:
            if self._opened_console is None:
                connection = self._connection
                self._opened_console = SqlConsole(connection.path, connection.manifest, connection.sae)
            return self._opened_console

    def close(self) -> None:
        if self._opened_console is not None:
            self._opened_console.close()


def _summary(connection: StoreConnection) -> dict[str, Any]:
    """A row of ``compare``."""
    meta, stored = connection.meta, connection.manifest.sae(connection.sae)
    query = "SELECT avg(dead::INT), avg(dense::INT), median(density) FILTER (NOT dead) FROM sae.feature"
    dead, dense, density = connection.rows(query)[0]
    known = ("name", "sae", "d_in", "d_sae", "k", "hook_name", "text", "n_tokens")
    evaluation = meta.get("eval") or {}
    sites = with_sites(meta)
    return {
        **{key: meta[key] for key in known},
        "l0": meta["n_activations"] / meta["n_tokens"],
        "dead": dead,
        "dense": dense,
        "median_density": density,
        **{score: evaluation.get(score) for score in SCORES},
        "bytes": stored.file.bytes + sum(file.bytes for file in stored.extras.values()),
        "sae_hash": meta["sae_hash"],
        "reads": ", ".join(site["name"] for site in sites["sites"]),
        "writes": ", ".join(site["name"] for site in sites["targets"]),
    }
