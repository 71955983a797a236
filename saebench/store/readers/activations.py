"""ActivationReader: single activations, from the table of all activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from saebench.core.errors import UserError
from saebench.store.connection import StoreConnection, limit_of
from saebench.store.limits import TimeLimitError
from saebench.store.readers.texts import TextReader
from saebench.store.schema import nearest

if TYPE_CHECKING:
    import pandas as pd

ACTIVATION_ORDERS = {"place": "ctx, pos", "value": "value DESC, ctx, pos"}


class ActivationReader:
    """Owns the tables act and act_by_ctx."""

    def __init__(self, connection: StoreConnection, texts: TextReader) -> None:
        self._connection, self._texts = connection, texts

    def activations(
        self,
        feature: int,
        *,
        between: tuple[float, float] | None = None,
        token: int | str | None = None,
        limit: int | None = None,
        order: str = "place",
    ) -> pd.DataFrame:
        """The activations of a feature, all or those that pass the filter. Columns ctx, pos, value.

        >>> largest = store.activations(3, limit=1, order="value")
        >>> bool(largest["value"][0] == store.feature(3)["max_act"])
        True

        Args:
            between: smallest and largest activation, both included.
            token: only where the text has this token (an id, or text as in ``features_on``).
            order: 'place', by ctx and pos, or 'value', largest first.

        Raises:
            UserError: no such feature, token or order.
        """
        if order not in ACTIVATION_ORDERS:
            raise UserError(f"{order!r} is not an order of activations; {nearest(order, ACTIVATION_ORDERS)}")
        query = "SELECT ctx, pos, value FROM sae.act WHERE feature = ?"
        values: list[object] = [self._connection.require_feature(feature)]
        if between is not None:
            query += " AND value BETWEEN ? AND ?"
            values += interval(*between)
        if token is not None:
            self._connection.require("context")
            query = (
                f"SELECT a.ctx, a.pos, a.value FROM ({query}) a JOIN txt.context c ON c.ctx = a.ctx "
                "WHERE list_contains(?, c.tokens[a.pos + 1])"
            )
            values.append(self._texts.token_ids(token))
        if token is not None or order != "place" or limit is not None:
            query += f" ORDER BY {ACTIVATION_ORDERS[order]}"
        if limit is not None:
            query += " LIMIT ?"
            values.append(limit_of("limit", limit))
        return self._connection.frame(query, values, timed=token is not None)

    def draw(self, feature: int, lo: float, hi: float, *, n: int, seed: int) -> pd.DataFrame:
        """``n`` activations drawn at random from those between ``lo`` and ``hi``, largest first."""
        return self._connection.frame(
            "SELECT * FROM (SELECT ctx, pos, value FROM sae.act WHERE feature = ? AND value BETWEEN ? AND ? "
            "ORDER BY hash(ctx, pos, ?), ctx, pos LIMIT ?) ORDER BY value DESC, ctx, pos",
            [self._connection.require_feature(feature), *interval(lo, hi), int(seed), limit_of("n", n)],
        )

    def in_contexts(self, feature: int, ctxs: Sequence[int]) -> dict[tuple[int, int], float]:
        """``(ctx, pos)`` -> activation of a feature in some contexts."""
        query = "SELECT ctx, pos, value FROM sae.act WHERE feature = ? AND ctx IN (SELECT unnest(?))"
        rows = self._connection.rows(query, [feature, list(ctxs)])
        return {(ctx, pos): value for ctx, pos, value in rows}

    def firing_at(self, ctx: int, pos: int) -> pd.DataFrame:
        """All features that fire on one token, largest activation first. Columns feature, value.

        A store without the table ``act_by_ctx`` reads all of ``act`` for the answer.

        >>> store.firing_at(ctx=0, pos=2).columns.tolist()
        ['feature', 'value']

        Raises:
            UserError: no such context, a negative position, or the time limit was reached.
        """
        frame = self.context_features(ctx)
        here = frame[frame["pos"] == limit_of("pos", pos)].drop(columns="pos")
        return here.sort_values(["value", "feature"], ascending=[False, True], ignore_index=True)

    def context_features(self, ctx: int, features: Sequence[int] | None = None) -> pd.DataFrame:
        """All activations in a context. Columns pos, feature, value; sorted by pos and feature.

        >>> set(store.context_features(0, [0, 3])["feature"]) <= {0, 3}
        True

        Args:
            features: only these; by default all, for which a store without the table ``act_by_ctx`` reads
                all of ``act``.

        Raises:
            UserError: no such context or feature, or the time limit was reached.
        """
        connection = self._connection
        ctx = self._texts.require_context(ctx)
        if features is not None:
            wanted = sorted({connection.require_feature(feature) for feature in features})
            query = (
                "SELECT pos, feature, value FROM sae.act WHERE feature IN (SELECT unnest(?)) AND ctx = ? "
                "ORDER BY pos, feature"
            )
            return connection.frame(query, [wanted, ctx])
        if connection.has("act_by_ctx"):
            listed = "SELECT pos, unnest(features) AS feature, unnest(acts) AS value FROM sae.act_by_ctx"
            return connection.frame(f"{listed} WHERE ctx = ? ORDER BY pos, feature", [ctx])
        query = "SELECT pos, feature, value FROM sae.act WHERE ctx = ? ORDER BY pos, feature"
        try:
            return connection.frame(query, [ctx], timed=True)
        except TimeLimitError:
            raise TimeLimitError(
                f"finding all features that fire in context {ctx} took longer than "
                f"{connection.time_limit:g} s, because the store {connection.path} has no table act_by_ctx "
                "and all of act was read; name some features, or set the store's time_limit to more"
            ) from None


def interval(lo: float, hi: float) -> list[float]:
    if not lo <= hi:
        raise UserError(f"there is nothing between {lo} and {hi}; give the smaller activation first")
    return [float(lo), float(hi)]
