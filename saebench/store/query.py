"""FeatureStore: every question that a page or a notebook asks of a store, answered read-only."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from saebench.errors import UserError
from saebench.store import publish
from saebench.store.database import open_reader, read_meta, tables_of
from saebench.store.filters import FeatureFilter, Range, order_clause
from saebench.store.schema import FEATURE, FORMAT_VERSION, GROUPS, nearest, require_column
from saebench.store.text import pieces

if TYPE_CHECKING:
    import duckdb
    import numpy as np
    import pandas as pd

ATTEMPTS = 5


def open_store(path: str | Path, sae: str | None = None) -> FeatureStore:
    """Open one SAE of a feature store for reading; by default the first.

    A reader sees one generation for as long as it is open, whatever is indexed meanwhile.

    Raises:
        UserError: no store at ``path``, a newer format, an unknown ``sae``, or a damaged file.
    """
    path = Path(path)
    for attempt in range(ATTEMPTS):
        manifest = publish.read_manifest(path)
        lock = publish.hold(path, manifest)
        try:
            return FeatureStore(path, manifest, sae, lock)
        except BaseException as error:
            if lock:
                lock.close()
            replaced = publish.read_manifest(path).generation != manifest.generation
            if not (isinstance(error, UserError) and replaced and attempt + 1 < ATTEMPTS):
                raise
    raise AssertionError


class FeatureStore:
    """One SAE of a store. Answers are pandas DataFrames unless said; safe to use from several threads.

    Attributes:
        path: directory of the store.
        sae: name of the SAE that is open.
        saes: names of all SAEs of the store.
        generation: number of the generation that is open.
        tables: names of the tables that exist, of the SAE and of its text.
    """

    def __init__(
        self, path: Path, manifest: publish.Manifest, sae: str | None, lock: IO[bytes] | None = None
    ) -> None:
        self.path = path
        self.saes = [stored.name for stored in manifest.saes]
        if not self.saes:
            raise UserError(f"the store {path} has no SAE; add one with saebench index")
        self.sae = self.saes[0] if sae is None else sae
        if self.sae not in self.saes:
            raise UserError(f"{sae!r} is not an SAE of the store {path}; {nearest(self.sae, self.saes)}")
        self.generation = manifest.generation
        self._lock = lock
        self._opening = threading.Lock()
        stored = manifest.sae(self.sae)
        text = manifest.texts[stored.text] if stored.text else None
        self._connection = open_reader(path / stored.file.path, path / text.path if text else None)
        try:
            self.tables = tables_of(self._connection, "sae") | tables_of(self._connection, "txt")
            self._meta = read_meta(self._connection)
        except BaseException:
            self._connection.close()
            raise
        version = self._meta.get("format_version")
        if version != FORMAT_VERSION:
            self._connection.close()
            raise UserError(
                f"{stored.file.path} of the store {path} has format {version} and this saebench reads "
                f"{FORMAT_VERSION}; run saebench index again with this version"
            )

    def close(self) -> None:
        self._connection.close()
        if self._lock:
            self._lock.close()

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.path)!r}, sae={self.sae!r}, generation={self.generation})"

    # The whole SAE

    def newer_generation(self) -> int | None:
        """Number of a generation that has been published since this one was opened."""
        current = publish.read_manifest(self.path).generation
        return current if current > self.generation else None

    def has(self, table: str) -> bool:
        return table in self.tables

    def info(self) -> dict[str, Any]:
        """What was indexed and how much of it.

        Keys: name, sae (architecture), d_in, d_sae, k, hook_name, model, text, n_tokens, n_contexts,
        n_documents, n_activations, n_dead, n_dense, eval (the run's eval.json or None), missing (table ->
        why it is absent, one sentence), sae_hash, cache_hash, generation.
        """
        dead, dense = self._rows("SELECT count(*) FILTER (dead), count(*) FILTER (dense) FROM sae.feature")[0]
        return {**self._meta, "n_dead": dead, "n_dense": dense, "generation": self.generation}

    def features(
        self,
        columns: Sequence[str] | None = None,
        *,
        ranges: Mapping[str, Range] | None = None,
        flags: Mapping[str, bool] | None = None,
        text: str | None = None,
        order_by: str = "feature",
        descending: bool = False,
        limit: int | None = None,
        offset: int = 0,
    ) -> pd.DataFrame:
        """The feature table: ``columns`` (all by default) of the features that pass the filter, in order.

        Args:
            ranges: column -> (lowest, highest), both included; None leaves that side open.
            flags: 'dead' or 'dense' -> the truth value it must have.
            text: part of the top token's text, in any case.
            order_by: a column; ties go by feature, unknown values come last.

        Raises:
            UserError: a column that does not exist.
        """
        names = ", ".join(require_column(FEATURE, name) for name in (columns or FEATURE.names))
        where, values = _filter(ranges, flags, text).where()
        query = f"SELECT {names} FROM sae.feature WHERE {where} ORDER BY {order_clause(order_by, descending)}"
        if limit is not None or offset:
            query += " LIMIT ? OFFSET ?"
            values += [2**62 if limit is None else limit, offset]
        return self._frame(query, values)

    def count_features(
        self, *, ranges: Mapping[str, Range] | None = None, flags: Mapping[str, bool] | None = None,
        text: str | None = None,
    ) -> int:  # fmt: skip
        """How many features pass the filter."""
        where, values = _filter(ranges, flags, text).where()
        return int(self._rows(f"SELECT count(*) FROM sae.feature WHERE {where}", values)[0][0])

    def neighbours_in_order(
        self, feature: int, *, ranges: Mapping[str, Range] | None = None, flags: Mapping[str, bool] | None = None,
        text: str | None = None, order_by: str = "feature", descending: bool = False,
    ) -> tuple[int | None, int | None]:  # fmt: skip
        """The features before and after ``feature`` in the filtered, sorted list; None at its ends.

        (None, None) when ``feature`` does not pass the filter itself.
        """
        where, values = _filter(ranges, flags, text).where()
        rows = self._rows(
            f"SELECT before, after FROM (SELECT feature, lag(feature) OVER w AS before, lead(feature) OVER w AS "
            f"after FROM sae.feature WHERE {where} WINDOW w AS (ORDER BY {order_clause(order_by, descending)})) "
            "WHERE feature = ?",
            [*values, self._known(feature)],
        )
        return rows[0] if rows else (None, None)

    # One feature

    def feature(self, feature: int) -> dict[str, Any]:
        """The row of one feature.

        Raises:
            UserError: no such feature.
        """
        rows = self._rows(f"SELECT {', '.join(FEATURE.names)} FROM sae.feature WHERE feature = ?",
                          [self._known(feature)])  # fmt: skip
        return dict(zip(FEATURE.names, rows[0], strict=True))

    def histogram(self, feature: int) -> pd.DataFrame:
        """Bins of its activations: lo, hi, count. Empty for a dead feature."""
        import numpy as np
        import pandas as pd

        rows = self._rows("SELECT lo, hi, counts FROM sae.hist WHERE feature = ?", [self._known(feature)])
        lo, hi, counts = rows[0] if rows else (0.0, 0.0, [])
        edges = np.linspace(lo, hi, len(counts) + 1)
        return pd.DataFrame({"lo": edges[:-1], "hi": edges[1:], "count": np.asarray(counts, dtype=np.int64)})

    def tokens(self, feature: int) -> pd.DataFrame:
        """Tokens it fires on: token, text, n, p_token_given_fire, p_fire_given_token, lift; most often first."""
        self._require("feature_token")
        return self._frame(
            "SELECT token, text, f.n, p_token_given_fire, p_fire_given_token, lift FROM sae.feature_token f "
            "JOIN txt.token USING (token) WHERE feature = ? ORDER BY rank",
            [self._known(feature)],
        )

    def examples(self, feature: int, group: str | None = None) -> pd.DataFrame:
        """Stored examples: group, rank, ctx, pos, value, doc, label, start, tokens, pieces, acts.

        ``group`` 'top' holds the largest activation of each of the contexts in which it fires hardest,
        'random' firings drawn uniformly. ``tokens``, ``pieces`` and ``acts`` are lists over the window,
        which begins at position ``start``; joined, the pieces are the decoded window. Without contexts
        the lists are empty.

        Raises:
            UserError: no such feature or group.
        """
        if group is not None and group not in GROUPS:
            raise UserError(f"{group!r} is not a group of examples; {nearest(group, GROUPS)}")
        wanted = list(GROUPS.values()) if group is None else [GROUPS[group]]
        label, join = ("label", "LEFT JOIN txt.document USING (doc)") if self.has("document") else ("NULL", "")
        frame = self._frame(
            f"SELECT grp, rank, ctx, pos, value, doc, {label} AS label, start, tokens, acts FROM sae.example "
            f"{join} WHERE feature = ? AND list_contains(?, grp) ORDER BY grp, rank",
            [self._known(feature), wanted],
        )
        names = {number: name for name, number in GROUPS.items()}
        frame.insert(0, "group", [names[number] for number in frame.pop("grp")])
        frame["tokens"] = [tokens.tolist() for tokens in frame["tokens"]]
        frame["acts"] = [acts.tolist() for acts in frame["acts"]]
        shown = self._pieces(frame["tokens"])
        frame.insert(frame.columns.get_loc("acts"), "pieces", shown)
        return frame

    def activations(self, feature: int) -> pd.DataFrame:
        """Every activation: ctx, pos, value, sorted by ctx and pos."""
        return self._frame("SELECT ctx, pos, value FROM sae.act WHERE feature = ?", [self._known(feature)])

    def logits(self, feature: int) -> pd.DataFrame:
        """Promoted (+1) and suppressed (-1) tokens: sign, rank, token, text, value (logits per unit)."""
        self._require("logit")
        return self._frame(
            "SELECT sign, rank, token, text, value FROM sae.logit JOIN txt.token USING (token) "
            "WHERE feature = ? ORDER BY sign DESC, rank",
            [self._known(feature)],
        )

    def neighbors(self, feature: int) -> pd.DataFrame:
        """Features with the nearest decoder rows: other, cosine."""
        return self._frame(
            "SELECT other, cosine FROM sae.neighbor WHERE feature = ? ORDER BY rank", [self._known(feature)]
        )

    def context(self, ctx: int) -> dict[str, Any]:
        """One context: ctx, n_tokens, tokens, pieces, docs (one a token), doc and label (of the first token).

        Raises:
            UserError: no such context, or a store without contexts.
        """
        self._require("context")
        rows = self._rows("SELECT n_tokens, tokens, docs FROM txt.context WHERE ctx = ?", [int(ctx)])
        if not rows:
            n_contexts = self._meta["n_contexts"]
            raise UserError(f"context {ctx} is not in the store {self.path}; it has 0 to {n_contexts - 1}")
        n_tokens, tokens, docs = rows[0]
        found = self._rows("SELECT label FROM txt.document WHERE doc = ?", [docs[0]])
        return {
            "ctx": int(ctx), "n_tokens": n_tokens, "tokens": tokens, "pieces": self._pieces([tokens])[0],
            "docs": docs, "doc": docs[0], "label": found[0][0] if found else None,
        }  # fmt: skip

    # How it asks

    def _cursor(self) -> duckdb.DuckDBPyConnection:
        with self._opening:
            return self._connection.cursor()

    def _rows(self, query: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        with self._cursor() as cursor:
            return cursor.execute(query, list(values)).fetchall()

    def _frame(self, query: str, values: Sequence[object] = ()) -> pd.DataFrame:
        with self._cursor() as cursor:
            frame = cursor.execute(query, list(values)).df()
        unsigned = [name for name, kind in frame.dtypes.items() if str(kind).lower().startswith("uint")]
        return frame.astype({name: _signed(frame.dtypes[name]) for name in unsigned})

    def _known(self, feature: int) -> int:
        d_sae = self._meta["d_sae"]
        if isinstance(feature, bool) or int(feature) != feature or not 0 <= feature < d_sae:
            raise UserError(f"feature {feature} is not in {self.sae!r}; it has 0 to {d_sae - 1}")
        return int(feature)

    def _require(self, table: str) -> None:
        if table not in self.tables:
            why = self._meta["missing"].get(table, "it was indexed without")
            raise UserError(f"the store {self.path} has no table {table!r} for {self.sae!r}: {why}")

    def _pieces(self, windows: Sequence[Sequence[int]]) -> list[list[str]]:
        """The text of the tokens of each window, with one query for all of them."""
        wanted = sorted({int(token) for window in windows for token in window})
        if not wanted:
            return [[] for _ in windows]
        found = self._rows("SELECT token, bytes FROM txt.token WHERE list_contains(?, token)", [wanted])
        vocab: dict[int, bytes] = dict(found)
        return [pieces([vocab[token] for token in window]) for window in windows]


def _signed(kind: object) -> str:
    """The signed type for a stored unsigned one: differences of positions must not wrap around."""
    return "Int64" if str(kind).startswith("U") else "int64"


def _filter(
    ranges: Mapping[str, Range] | None, flags: Mapping[str, bool] | None, text: str | None
) -> FeatureFilter:
    return FeatureFilter(ranges=ranges or {}, flags=flags or {}, text=text)
