"""TextReader: tokens, contexts and labels of documents, from the text file of a store."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from saebench.core.errors import UserError
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
    """Owns the tables token, context and document."""

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

        Keys: ctx, n_tokens, tokens, pieces, docs (one per token), doc and label (of the first token).

        >>> len(store.context(0)["tokens"]) == store.context(0)["n_tokens"]
        True

        Raises:
            UserError: no such context, or a store without contexts.
        """
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
        n_contexts = meta["n_contexts"] if self._connection.has("context") else meta["n_tokens"]
        known = hasattr(ctx, "__index__") and not isinstance(ctx, bool)
        if not (known and 0 <= ctx < n_contexts):
            raise UserError(
                f"context {ctx} is not in the store {self._connection.path}; it has 0 to {n_contexts - 1}"
            )
        return int(ctx)
