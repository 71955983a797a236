"""Questions below the stored summaries: tokens, single activations, contexts, straight from the table act."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from saebench.core.errors import UserError
from saebench.store.limits import check_pattern
from saebench.store.reader import StoreReader
from saebench.store.schema import HIST_BINS, HIST_KINDS, nearest, one_of
from saebench.store.windows import BEFORE

if TYPE_CHECKING:
    import pandas as pd

MOST_TOKENS = 200
"""Tokens that a piece of text may stand for at most; the most frequent ones are taken."""

TOKEN_ORDERS = {
    "specificity": "n * ln(lift)",
    "n": "n",
    "p_fire_given_token": "p_fire_given_token",
    "p_token_given_fire": "p_token_given_fire",
    "lift": "lift",
}
ROUNDING = 1e-6
PLACE_ORDERS = {"place": "ctx, pos", "value": "value DESC, ctx, pos"}


class DrillDown(StoreReader):
    """The part of a FeatureStore that looks at single tokens, activations and contexts."""

    # Tokens

    def find_tokens(
        self,
        text: str | None = None,
        *,
        regex: str | None = None,
        token: int | str | None = None,
        limit: int = MOST_TOKENS,
    ) -> pd.DataFrame:
        """Tokens by their text, most frequent first: token, text, n (rows of the cache with the token).

        >>> store.find_tokens(regex="^ S").columns.tolist()
        ['token', 'text', 'n']

        Args:
            text: part of the token's text, in any case.
            regex: a regular expression (RE2) found in it; ``(?i)`` at its start ignores case.
            token: an id, or the whole text, of which several tokens may be.

        Raises:
            UserError: no token of that id, not a regular expression, a store without tokens, or the time
                limit was reached.
        """
        self._require("token")
        conditions, values = ["true"], list[object]()
        if text is not None:
            conditions.append("contains(lower(text), lower(?))")
            values.append(text)
        if regex is not None:
            conditions.append("regexp_matches(text, ?)")
            values.append(check_pattern(regex))
        if token is not None:
            conditions.append("text = ?" if isinstance(token, str) else "token = ?")
            values.append(token if isinstance(token, str) else self._known_token(token))
        query = (
            f"SELECT token, text, n FROM txt.token WHERE {' AND '.join(conditions)} ORDER BY n DESC, token"
        )
        return self._frame(f"{query} LIMIT ?", [*values, _at_least_0("limit", limit)], timed=True)

    def features_on(
        self, token: int | str | Sequence[int], *, order_by: str = "specificity", limit: int | None = 100
    ) -> pd.DataFrame:
        """Features that fire on a token, the most telling first.

        Columns token, text, feature, n (times it fires on the token), p_fire_given_token,
        p_token_given_fire, lift. The store lists up to 32 features of a token, by specificity.

        >>> found = store.features_on(store.features()["top_token"][0])
        >>> bool((found["n"] > 0).all())
        True

        Args:
            token: an id, several ids, or text: the tokens that are exactly this text, else those that
                contain it in any case (the most frequent ones, when there are many).
            order_by: 'specificity' (n * log lift: often on this token, and on others less), or a column;
                large values first.

        Raises:
            UserError: no such token or order, or a store without tokens.
        """
        self._require("token_feature")
        if order_by not in TOKEN_ORDERS:
            raise UserError(f"{order_by!r} is no order of features; {nearest(order_by, TOKEN_ORDERS)}")
        query = (
            "SELECT token, feature, n, p_fire_given_token, p_token_given_fire, lift FROM sae.token_feature "
            "WHERE token IN (SELECT unnest(?::UBIGINT[])) "
            f"ORDER BY {TOKEN_ORDERS[order_by]} DESC, token, feature LIMIT ?"
        )
        number = 2**62 if limit is None else _at_least_0("limit", limit)
        return self._with_text(self._frame(query, [self._tokens_of(token), number], timed=True))

    def _tokens_of(self, token: int | str | Sequence[int]) -> list[int]:
        if isinstance(token, str):
            exact = self._rows("SELECT token FROM txt.token WHERE text = ? ORDER BY token", [token])
            if exact:
                return [number for (number,) in exact]
            found: list[int] = self.find_tokens(token)["token"].tolist() if token else []
            if not found:
                raise UserError(
                    f"no token of {self.sae!r} is or contains {token!r}; a word may be several tokens, "
                    "so search for a part of it"
                )
            return found
        if not isinstance(token, int) and isinstance(token, Sequence):
            return [self._known_token(number) for number in token]
        return [self._known_token(token)]

    # Activations

    def activations(
        self,
        feature: int,
        *,
        between: tuple[float, float] | None = None,
        token: int | str | None = None,
        limit: int | None = None,
        order: str = "place",
    ) -> pd.DataFrame:
        """Its activations: ctx, pos, value; all of them, or those that pass the filter.

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
        if order not in PLACE_ORDERS:
            raise UserError(f"{order!r} is no order of activations; {nearest(order, PLACE_ORDERS)}")
        query = "SELECT ctx, pos, value FROM sae.act WHERE feature = ?"
        values: list[object] = [self._known(feature)]
        if between is not None:
            query += " AND value BETWEEN ? AND ?"
            values += _interval(*between)
        if token is not None:
            self._require("context")
            query = (
                f"SELECT a.ctx, a.pos, a.value FROM ({query}) a JOIN txt.context c ON c.ctx = a.ctx "
                "WHERE list_contains(?, c.tokens[a.pos + 1])"
            )
            values.append(self._tokens_of(token))
        if token is not None or order != "place" or limit is not None:
            query += f" ORDER BY {PLACE_ORDERS[order]}"
        if limit is not None:
            query += " LIMIT ?"
            values.append(_at_least_0("limit", limit))
        return self._frame(query, values, timed=token is not None)

    def examples_between(
        self, feature: int, lo: float, hi: float, *, n: int = 20, seed: int = 0, window: int | None = None
    ) -> pd.DataFrame:
        """Examples drawn at random from the activations between ``lo`` and ``hi``, both included.

        Columns rank, ctx, pos, value, doc, label, start, tokens, pieces, acts, as ``examples`` has them;
        strongest first. The same seed draws the same ones. Without contexts the lists are empty.

        >>> bar = store.histogram(0).iloc[-1]
        >>> drawn = store.examples_between(0, bar["lo"], bar["hi"], n=3)
        >>> bool(drawn["value"].between(bar["lo"], bar["hi"]).all())
        True

        Args:
            window: tokens shown around each; by default as many as in stored examples.

        Raises:
            UserError: no such feature, or ``lo`` above ``hi``.
        """
        width = self._width(window)
        drawn = self._frame(
            "SELECT * FROM (SELECT ctx, pos, value FROM sae.act WHERE feature = ? AND value BETWEEN ? AND ? "
            "ORDER BY hash(ctx, pos, ?), ctx, pos LIMIT ?) ORDER BY value DESC, ctx, pos",
            [self._known(feature), *_interval(lo, hi), int(seed), _at_least_0("n", n)],
        )
        return self._shown(int(feature), drawn, width)

    def examples_on(
        self, feature: int, token: int | str, *, n: int = 20, window: int | None = None
    ) -> pd.DataFrame:
        """Examples where it fires on a token, the strongest first, with the columns of ``examples_between``.

        >>> token = int(store.tokens(3)["token"][0])
        >>> found = store.examples_on(3, token, n=2)
        >>> all(row.tokens[row.pos - row.start] == token for row in found.itertuples())
        True

        Args:
            token: an id, or text as in ``features_on``.
            window: tokens shown around each; by default as many as in stored examples.

        Raises:
            UserError: no such feature or token, a store without contexts, or the time limit was reached.
        """
        width = self._width(window)
        drawn = self.activations(feature, token=token, limit=n, order="value")
        return self._shown(int(feature), drawn, width)

    def _width(self, window: int | None) -> int:
        width: int = self._meta["window"] if window is None else window
        if width < 1:
            raise UserError(f"window is {width}; it must be at least 1")
        return width

    def _shown(self, feature: int, drawn: pd.DataFrame, width: int) -> pd.DataFrame:
        """Activations as examples: with rank and the window around each."""
        drawn.insert(0, "rank", range(len(drawn)))
        windows = self._windows(feature, drawn, width)
        for name in ("doc", "label", "start", "tokens", "pieces", "acts"):
            drawn[name] = [shown[name] for shown in windows]
        return drawn

    def examples_in_bin(
        self, feature: int, bin: int, kind: str = "value", *, n: int = 20, seed: int = 0
    ) -> pd.DataFrame:
        """Examples drawn at random from one bar of ``histogram(feature, kind)``.

        As ``examples_between`` gives them; empty for a feature that fires on no token.

        >>> last = len(store.histogram(0)) - 1
        >>> bool(store.examples_in_bin(0, last)["value"].max() == store.feature(0)["max_act"])
        True

        Raises:
            UserError: no such feature, kind or bar.
        """
        if not 0 <= bin < HIST_BINS:
            raise UserError(f"bin {bin} is not in the histogram; it has 0 to {HIST_BINS - 1}")
        bars = self.histogram(feature, kind)
        if bars.empty:
            return self.examples_between(feature, 0.0, 0.0, n=0)
        lo, hi = float(bars["lo"][bin]), float(bars["hi"][bin])
        if kind == "log10":  # the edges were rounded when they became logarithms
            lo, hi = 10**lo * (1 - ROUNDING), 10**hi * (1 + ROUNDING)
        return self.examples_between(feature, lo, hi, n=n, seed=seed)

    def histogram(self, feature: int, kind: str = "value") -> pd.DataFrame:
        """Bins of its activations, or of their log10 (kind 'log10'): lo, hi, count. Empty for a dead one.

        >>> bool(store.histogram(3)["count"].sum() == store.feature(3)["n_act"])
        True
        """
        import numpy as np
        import pandas as pd

        rows = self._rows(
            "SELECT lo, hi, counts FROM sae.hist WHERE feature = ? AND kind = ?",
            [self._known(feature), one_of(HIST_KINDS, kind, "kind of histogram")],
        )
        lo, hi, counts = rows[0] if rows else (0.0, 0.0, [])
        edges = np.linspace(lo, hi, len(counts) + 1)
        return pd.DataFrame({"lo": edges[:-1], "hi": edges[1:], "count": np.asarray(counts, dtype=np.int64)})

    def _windows(self, feature: int, drawn: pd.DataFrame, width: int) -> list[dict[str, Any]]:
        """For each activation of ``drawn``: doc, label, and the window around it."""
        if not self.has("context"):
            lists: dict[str, Any] = {"tokens": [], "pieces": [], "acts": []}
            empty = {"doc": None, "label": None, "start": 0} | lists
            return [empty] * len(drawn)
        wanted = sorted(set(drawn["ctx"].tolist()))
        contexts = {
            ctx: (tokens, docs)
            for ctx, tokens, docs in self._rows(
                "SELECT ctx, tokens, docs FROM txt.context WHERE ctx IN (SELECT unnest(?))", [wanted]
            )
        }
        act = {
            (ctx, pos): value
            for ctx, pos, value in self._rows(
                "SELECT ctx, pos, value FROM sae.act WHERE feature = ? AND ctx IN (SELECT unnest(?))",
                [feature, wanted],
            )
        }
        labels = self._labels([contexts[ctx][1][pos] for ctx, pos in _places(drawn)])
        windows = []
        for ctx, pos in _places(drawn):
            tokens, docs = contexts[ctx]
            start = min(max(pos - int(width * BEFORE), 0), max(len(tokens) - width, 0))
            shown = tokens[start : start + width]
            windows.append({
                "doc": docs[pos], "label": labels.get(docs[pos]), "start": start, "tokens": shown,
                "pieces": self._pieces(shown),
                "acts": [act.get((ctx, start + at), 0.0) for at in range(len(shown))],
            })  # fmt: skip
        return windows

    # Contexts

    def firing_at(self, ctx: int, pos: int) -> pd.DataFrame:
        """All features that fire on one token: feature, value; strongest first.

        A store without the table ``act_by_ctx`` answers by reading all of ``act``.

        >>> store.firing_at(ctx=0, pos=2).columns.tolist()
        ['feature', 'value']

        Raises:
            UserError: no such context, a negative position, or the time limit was reached.
        """
        frame = self.context_features(ctx)
        here = frame[frame["pos"] == _at_least_0("pos", pos)].drop(columns="pos")
        return here.sort_values(["value", "feature"], ascending=[False, True], ignore_index=True)

    def context_features(self, ctx: int, features: Sequence[int] | None = None) -> pd.DataFrame:
        """What fires over a context: pos, feature, value, in that order.

        >>> set(store.context_features(0, [0, 3])["feature"]) <= {0, 3}
        True

        Args:
            features: only these; by default all, which a store without the table ``act_by_ctx`` answers
                by reading all of ``act``.

        Raises:
            UserError: no such context or feature, or the time limit was reached.
        """
        ctx = self._known_context(ctx)
        if features is not None:
            wanted = sorted({self._known(feature) for feature in features})
            query = (
                "SELECT pos, feature, value FROM sae.act WHERE feature IN (SELECT unnest(?)) AND ctx = ? "
                "ORDER BY pos, feature"
            )
            return self._frame(query, [wanted, ctx])
        if self.has("act_by_ctx"):
            listed = "SELECT pos, unnest(features) AS feature, unnest(acts) AS value FROM sae.act_by_ctx"
            return self._frame(f"{listed} WHERE ctx = ? ORDER BY pos, feature", [ctx])
        query = "SELECT pos, feature, value FROM sae.act WHERE ctx = ? ORDER BY pos, feature"
        try:
            return self._frame(query, [ctx], timed=True)
        except UserError as error:
            if "took longer" not in str(error):
                raise
            raise UserError(
                f"finding all that fires in context {ctx} took longer than {self.time_limit:g} s, because "
                f"the store {self.path} has no table act_by_ctx and all of act was read; name some features, "
                "or set the store's time_limit to more"
            ) from None

    # Names

    def has(self, table: str) -> bool:
        """Whether the store has a table."""
        return table in self.tables

    def _known_token(self, token: Any) -> int:
        known = hasattr(token, "__index__") and not isinstance(token, bool)
        if not (known and 0 <= token < len(self._vocab)):
            raise UserError(
                f"token {token!r} is not in the vocabulary of {self.path}; it has 0 to {len(self._vocab) - 1}"
            )
        return int(token)

    def _known_context(self, ctx: int) -> int:
        n_contexts = self._meta["n_contexts"] if self.has("context") else self._meta["n_tokens"]
        known = hasattr(ctx, "__index__") and not isinstance(ctx, bool)
        if not (known and 0 <= ctx < n_contexts):
            raise UserError(f"context {ctx} is not in the store {self.path}; it has 0 to {n_contexts - 1}")
        return int(ctx)


def _places(frame: pd.DataFrame) -> list[tuple[int, int]]:
    return list(zip(frame["ctx"].tolist(), frame["pos"].tolist(), strict=True))


def _interval(lo: float, hi: float) -> list[float]:
    if not lo <= hi:
        raise UserError(f"there is nothing between {lo} and {hi}; give the smaller activation first")
    return [float(lo), float(hi)]


def _at_least_0(name: str, value: int) -> int:
    if value < 0:
        raise UserError(f"{name} is {value}; it must be at least 0")
    return min(int(value), 2**62)
