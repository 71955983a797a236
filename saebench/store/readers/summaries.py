"""SummaryReader: statistics of each feature, such as its histogram and its top tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from saebench.core.errors import UserError
from saebench.store.connection import StoreConnection, limit_of
from saebench.store.readers.texts import TextReader
from saebench.store.schema import HIST_KINDS, NEIGHBOR_KINDS, QUANTILE_GRID, TOKEN_ROLES, nearest, one_of

if TYPE_CHECKING:
    import pandas as pd

TOKEN_FEATURE_ORDERS = {
    "specificity": "n * ln(lift)",
    "n": "n",
    "p_fire_given_token": "p_fire_given_token",
    "p_token_given_fire": "p_token_given_fire",
    "lift": "lift",
}


class SummaryReader:
    """Owns hist, quantile, position, feature_token, token_feature, feature_label, logit, neighbor and
    site_norm."""

    def __init__(self, connection: StoreConnection, texts: TextReader) -> None:
        self._connection, self._texts = connection, texts

    def histogram(self, feature: int, kind: str = "value") -> pd.DataFrame:
        """Histogram of its activations, or of their log10 (``kind`` 'log10').

        Columns lo, hi, count, one row per bin. Empty for a dead feature.

        >>> bool(store.histogram(3)["count"].sum() == store.feature(3)["n_act"])
        True

        Raises:
            UserError: no such feature or kind.
        """
        import numpy as np
        import pandas as pd

        rows = self._connection.rows(
            "SELECT lo, hi, counts FROM sae.hist WHERE feature = ? AND kind = ?",
            [self._connection.require_feature(feature), one_of(HIST_KINDS, kind, "kind of histogram")],
        )
        lo, hi, counts = rows[0] if rows else (0.0, 0.0, [])
        edges = np.linspace(lo, hi, len(counts) + 1)
        return pd.DataFrame({"lo": edges[:-1], "hi": edges[1:], "count": np.asarray(counts, dtype=np.int64)})

    def quantiles(self, feature: int) -> pd.DataFrame:
        """Quantiles of its activations. Columns q (0 to 1), value. Empty for a dead feature.

        >>> bool(store.quantiles(3)["value"].is_monotonic_increasing)
        True

        Raises:
            UserError: no such feature.
        """
        import pandas as pd

        rows = self._connection.rows(
            "SELECT qs FROM sae.quantile WHERE feature = ?", [self._connection.require_feature(feature)]
        )
        return pd.DataFrame({"q": QUANTILE_GRID if rows else (), "value": rows[0][0] if rows else ()})

    def positions(self, feature: int) -> pd.DataFrame:
        """Where in the context it fires, one row per range of positions. Empty for a dead feature.

        Columns lo, hi (first position, and the one after the last), n (firings), share (of its firings),
        p_fire (share of the tokens in the range on which it fires).

        >>> bool(store.positions(3)["n"].sum() == store.feature(3)["n_act"])
        True

        Raises:
            UserError: no such feature, or a store without contexts.
        """
        import numpy as np
        import pandas as pd

        self._connection.require("position")
        rows = self._connection.rows(
            "SELECT counts FROM sae.position WHERE feature = ?", [self._connection.require_feature(feature)]
        )
        meta = self._connection.meta
        n, total = np.array(rows[0][0] if rows else []), np.array(meta["position_rows"])
        edges = -(-np.arange(len(total) + 1) * meta["ctx_len"] // len(total))
        lo, hi = edges[: len(n)], edges[1 : len(n) + 1]
        shares = {"share": n / max(n.sum(), 1), "p_fire": n / np.maximum(total[: len(n)], 1)}
        return pd.DataFrame({"lo": lo, "hi": hi, "n": n, **shares})

    def tokens(self, feature: int, role: str = "active") -> pd.DataFrame:
        """Tokens that a feature fires on, most frequent first.

        Columns token, text, n (firings), p_token_given_fire, p_fire_given_token, lift.

        >>> bool((store.tokens(3)["n"] > 0).all())
        True

        Args:
            role: 'active', the token it fires on, or 'previous' or 'next', the one before or after it.

        Raises:
            UserError: no such feature or role, or a store without tokens.
        """
        self._connection.require("feature_token")
        return self._texts.with_text(
            self._connection.frame(
                "SELECT token, n, p_token_given_fire, p_fire_given_token, lift FROM sae.feature_token "
                "WHERE feature = ? AND role = ? ORDER BY rank",
                [self._connection.require_feature(feature), one_of(TOKEN_ROLES, role, "role of a token")],
            )
        )

    def features_on(
        self, token: int | str | Sequence[int], *, order_by: str = "specificity", limit: int | None = 100
    ) -> pd.DataFrame:
        """Features that fire on a token, most specific first.

        Columns token, text, feature, n (times it fires on the token), p_fire_given_token,
        p_token_given_fire, lift. The store keeps up to 32 features per token, by specificity.

        >>> found = store.features_on(store.features()["top_token"][0])
        >>> bool((found["n"] > 0).all())
        True

        Args:
            token: an id, several ids, or text: the tokens that are exactly this text, else those that
                contain it in any case (the most frequent ones, when there are many).
            order_by: 'specificity' (n * log lift: often on this token, and less on others), or a column;
                large values first.

        Raises:
            UserError: no such token or order, or a store without tokens.
        """
        self._connection.require("token_feature")
        if order_by not in TOKEN_FEATURE_ORDERS:
            raise UserError(
                f"{order_by!r} is not an order of features; {nearest(order_by, TOKEN_FEATURE_ORDERS)}"
            )
        query = (
            "SELECT token, feature, n, p_fire_given_token, p_token_given_fire, lift FROM sae.token_feature "
            "WHERE token IN (SELECT unnest(?::UBIGINT[])) "
            f"ORDER BY {TOKEN_FEATURE_ORDERS[order_by]} DESC, token, feature LIMIT ?"
        )
        n = limit_of("limit", limit)
        values = [self._texts.token_ids(token), n]
        return self._texts.with_text(self._connection.frame(query, values, timed=True))

    def labels(self, feature: int) -> pd.DataFrame:
        """Labels of the documents that a feature fires in, most frequent first.

        Columns label, n (firings in documents with the label), p_label_given_fire, lift.

        Raises:
            UserError: no such feature, or a store without labels.
        """
        self._connection.require("feature_label")
        return self._connection.frame(
            "SELECT label, n, p_label_given_fire, lift FROM sae.feature_label WHERE feature = ? "
            "ORDER BY rank",
            [self._connection.require_feature(feature)],
        )

    def logits(self, feature: int) -> pd.DataFrame:
        """Tokens whose logits a feature raises (sign +1, promoted) or lowers (-1, suppressed).

        Columns sign, rank, token, text, value (change of the logit per unit of activation).

        >>> sorted(set(store.logits(3)["sign"]))
        [-1, 1]

        Raises:
            UserError: no such feature, or a store without logits.
        """
        self._connection.require("logit")
        return self._texts.with_text(
            self._connection.frame(
                "SELECT sign, rank, token, value FROM sae.logit WHERE feature = ? ORDER BY sign DESC, rank",
                [self._connection.require_feature(feature)],
            )
        )

    def site_norms(self, feature: int) -> pd.DataFrame:
        """The decoder norm of a crosscoder's latent at each site, in the order of the sites.

        Columns name, norm (divided by the standard deviation of the site's rows), share (of the sum of the
        norms; missing if they are all 0).

        Raises:
            UserError: no such feature, or the SAE is not a crosscoder.
        """
        if not self._connection.has("site_norm"):
            raise UserError(
                f"{self._connection.sae!r} of the store {self._connection.path} is not a crosscoder, so it "
                "has no decoder norms per site; open a crosscoder with saebench.open_store(STORE, NAME)"
            )
        return self._connection.frame(
            "SELECT name, norm, share FROM sites.site_norm WHERE feature = ? ORDER BY site",
            [self._connection.require_feature(feature)],
        )

    def neighbors(self, feature: int, kind: str = "decoder") -> pd.DataFrame:
        """The nearest other features, nearest first.

        ``kind`` 'decoder' or 'encoder': columns other, cosine (of the directions). 'cofire': other, score
        (tokens on which both fire / on which either fires), n_both. 'correlation': other, score, n_both.

        >>> bool(store.neighbors(3)["cosine"].is_monotonic_decreasing)
        True

        Raises:
            UserError: no such feature or kind.
        """
        columns = "score AS cosine" if kind in ("decoder", "encoder") else "score, n_both"
        return self._connection.frame(
            f"SELECT other, {columns} FROM sae.neighbor WHERE kind = ? AND feature = ? ORDER BY rank",
            [
                one_of(NEIGHBOR_KINDS, kind, "kind of neighbor"),
                self._connection.require_feature(feature),
            ],
        )
