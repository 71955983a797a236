"""TextReader: tokens, contexts or other units, and labels of documents, from the text file of a store."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from saebench.core.errors import UserError
from saebench.sources.modality import UNIT, Modality, modality
from saebench.store.connection import StoreConnection, limit_of
from saebench.store.limits import check_pattern
from saebench.store.text import pieces, token_text

if TYPE_CHECKING:
    import pandas as pd

MAX_TOKENS = 200
"""A text that is given for a token stands for this many tokens at most; the most frequent ones are taken."""
MAX_CACHED_LABELS = 200_000
"""With at most this many documents, all labels are read once; with more, those that are needed."""


class TextReader:
    """Owns the tables token, context, document and unit."""

    def __init__(self, connection: StoreConnection) -> None:
        self._connection = connection

    @functools.cached_property
    def vocab(self) -> list[bytes]:
        """Every token's exact bytes; empty in a store without text.

        Read once, because a join for the text of a token costs milliseconds.
        """
        if not self._connection.has("token"):
            return []
        return [token for (token,) in self._connection.rows("SELECT bytes FROM txt.token ORDER BY token")]

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token of a window; joined, they are the decoded window."""
        return pieces([self.vocab[token] for token in tokens])

    def with_text(self, frame: pd.DataFrame) -> pd.DataFrame:
        """``frame`` with a column ``text`` after its column ``token``."""
        at = frame.columns.get_loc("token")
        frame.insert(at + 1, "text", [token_text(self.vocab[token]) for token in frame["token"]])
        return frame

    def labels_of(self, docs: Iterable[int]) -> dict[int, str | None]:
        """Document -> label; empty in a store without documents."""
        wanted = [int(doc) for doc in docs]
        if not wanted or not self._connection.has("document"):
            return {}
        if self._connection.meta["n_documents"] <= MAX_CACHED_LABELS:
            return {doc: self._all_labels[doc] for doc in wanted}
        query = "SELECT doc, label FROM txt.document WHERE doc IN (SELECT unnest(?))"
        return dict(self._connection.rows(query, [wanted]))

    @functools.cached_property
    def _all_labels(self) -> list[str | None]:
        return [label for (label,) in self._connection.rows("SELECT label FROM txt.document ORDER BY doc")]

    def context(self, ctx: int) -> dict[str, Any]:
        """One context.

        Keys: ctx, n_tokens, tokens, pieces, docs (one per token), doc and label (of the first token). Of
        a unit that is not a text, ``n_tokens`` is the number of its positions, ``tokens`` and ``docs`` are
        empty, and ``label`` has the values of its columns.

        >>> len(store.context(0)["tokens"]) == store.context(0)["n_tokens"]
        True

        Raises:
            UserError: no such context, or a store without contexts.
        """
        if self._connection.has("unit"):
            return self._unit(self.require_context(ctx))
        self._connection.require("context")
        ctx = self.require_context(ctx)
        query = "SELECT n_tokens, tokens, docs FROM txt.context WHERE ctx = ?"
        n_tokens, tokens, docs = self._connection.rows(query, [ctx])[0]
        return {
            "ctx": ctx,
            "n_tokens": n_tokens,
            "tokens": tokens,
            "pieces": self.pieces(tokens),
            "docs": docs,
            "doc": docs[0],
            "label": self.labels_of(docs[:1]).get(docs[0]),
        }

    @functools.cached_property
    def modality(self) -> Modality:
        """What the units of the store are."""
        return modality(self._connection.meta.get("modality", UNIT.name))

    @functools.cached_property
    def _unit_columns(self) -> tuple[list[str], list[str]]:
        """The names of the columns per unit and per row."""
        meta = self._connection.read_meta("txt")
        return meta["unit_columns"], meta["row_columns"]

    def _unit(self, ctx: int) -> dict[str, Any]:
        query = "SELECT n_positions, unit_values FROM txt.unit WHERE ctx = ?"
        n_positions, values = self._connection.rows(query, [ctx])[0]
        named = dict(zip(self._unit_columns[0], values, strict=True))
        return {
            "ctx": ctx,
            "n_tokens": n_positions,
            "tokens": [],
            "pieces": self.modality.pieces(ctx, 0, n_positions),
            "docs": [],
            "doc": None,
            "label": self.modality.describe(named) or None,
        }

    def lengths_of(self, ctxs: Sequence[int]) -> dict[int, int]:
        """Unit -> its positions; of a store without the table unit, each has one."""
        if not self._connection.has("unit"):
            return dict.fromkeys(ctxs, 1)
        query = "SELECT ctx, n_positions FROM txt.unit WHERE ctx IN (SELECT unnest(?))"
        return dict(self._connection.rows(query, [list(ctxs)]))

    def unit_labels(self, places: Sequence[tuple[int, int]]) -> list[str | None]:
        """For each (unit, position) the values of the user's columns in words, None without columns."""
        if not self._connection.has("unit") or not any(self._unit_columns):
            return [None] * len(places)
        of_unit, of_row = self._unit_columns
        query = "SELECT ctx, kept, unit_values, row_values FROM txt.unit WHERE ctx IN (SELECT unnest(?))"
        found = {row[0]: row[1:] for row in self._connection.rows(query, [sorted({c for c, _ in places})])}
        labels = []
        for ctx, pos in places:
            kept, values, row_values = found[ctx]
            named = dict(zip(of_unit, values, strict=True))
            if of_row:
                start = sum(kept[:pos]) * len(of_row)
                named |= dict(zip(of_row, row_values[start : start + len(of_row)], strict=True))
            labels.append(self.modality.describe(named) or None)
        return labels

    def contexts(self, ctxs: Sequence[int]) -> dict[int, tuple[list[int], list[int]]]:
        """Context -> its tokens and their documents."""
        query = "SELECT ctx, tokens, docs FROM txt.context WHERE ctx IN (SELECT unnest(?))"
        return {ctx: (tokens, docs) for ctx, tokens, docs in self._connection.rows(query, [list(ctxs)])}

    def find_tokens(
        self,
        text: str | None = None,
        *,
        regex: str | None = None,
        token: int | str | None = None,
        limit: int = MAX_TOKENS,
    ) -> pd.DataFrame:
        """Tokens found by their text, most frequent first.

        Columns token, text, n (rows of the cache with the token).

        >>> store.find_tokens(regex="^ S").columns.tolist()
        ['token', 'text', 'n']

        Args:
            text: part of the token's text; case does not matter.
            regex: a regular expression (RE2) found in it; ``(?i)`` at its start ignores case.
            token: an id, or the whole text, which several tokens may share.

        Raises:
            UserError: no token with that id, not a regular expression, a store without tokens, or the time
                limit was reached.
        """
        self._connection.require("token")
        conditions, values = ["true"], list[object]()
        if text is not None:
            conditions.append("contains(lower(text), lower(?))")
            values.append(text)
        if regex is not None:
            conditions.append("regexp_matches(text, ?)")
            values.append(check_pattern(regex))
        if token is not None:
            conditions.append("text = ?" if isinstance(token, str) else "token = ?")
            values.append(token if isinstance(token, str) else self._require_token(token))
        query = (
            f"SELECT token, text, n FROM txt.token WHERE {' AND '.join(conditions)} "
            "ORDER BY n DESC, token LIMIT ?"
        )
        return self._connection.frame(query, [*values, limit_of("limit", limit)], timed=True)

    def token_ids(self, token: int | str | Sequence[int]) -> list[int]:
        """The ids that ``token`` stands for: an id, several ids, or text.

        Text stands for the tokens that are exactly this text, else for the most frequent ones that contain
        it in any case.

        Raises:
            UserError: no such token.
        """
        if isinstance(token, str):
            exact = self._connection.rows(
                "SELECT token FROM txt.token WHERE text = ? ORDER BY token", [token]
            )
            if exact:
                return [number for (number,) in exact]
            found: list[int] = self.find_tokens(token)["token"].tolist() if token else []
            if not found:
                raise UserError(
                    f"no token of {self._connection.sae!r} is or contains {token!r}; a word may be several "
                    "tokens, so search for a part of it"
                )
            return found
        if not isinstance(token, int) and isinstance(token, Sequence):
            return [self._require_token(number) for number in token]
        return [self._require_token(token)]

    def _require_token(self, token: Any) -> int:
        known = hasattr(token, "__index__") and not isinstance(token, bool)
        if not (known and 0 <= token < len(self.vocab)):
            raise UserError(
                f"token {token!r} is not in the vocabulary of {self._connection.path}; "
                f"it has 0 to {len(self.vocab) - 1}"
            )
        return int(token)

    def require_context(self, ctx: int) -> int:
        """``ctx`` as an int, if it is the number of a context (without contexts: of a row of the cache).

        Raises:
            UserError: it is not.
        """
        meta = self._connection.meta
        counted = self._connection.has("context") or self._connection.has("unit")
        n_contexts = meta["n_contexts"] if counted else meta["n_tokens"]
        known = hasattr(ctx, "__index__") and not isinstance(ctx, bool)
        if not (known and 0 <= ctx < n_contexts):
            raise UserError(
                f"context {ctx} is not in the store {self._connection.path}; it has 0 to {n_contexts - 1}"
            )
        return int(ctx)
