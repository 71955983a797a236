"""FeatureStore: every question that a page or a notebook asks of a store, answered read-only."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.core.deprecation import renamed
from saebench.core.errors import UserError
from saebench.store import publish
from saebench.store.annotations import Annotations
from saebench.store.cross_sae import CrossSaeQueries
from saebench.store.explanations import ExplanationReader
from saebench.store.filters import FeatureFilter, Range, feature_source, order_clause
from saebench.store.schema import (
    FEATURE,
    FEATURE_EXTRAS,
    GROUPS,
    NEIGHBOR_KINDS,
    QUANTILE_GRID,
    TOKEN_ROLES,
    extra_of,
    feature_column,
    nearest,
    one_of,
)

if TYPE_CHECKING:
    import pandas as pd

ATTEMPTS = 5
MOST_ROWS = 2**62


def open_store(path: str | Path, sae: str | None = None) -> FeatureStore:
    """Open one SAE of a feature store for reading; by default the first.

    A reader sees one generation for as long as it is open, whatever is indexed meanwhile.

    >>> with sb.open_store(store.path) as opened:
    ...     opened.saes == store.saes
    True

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


class FeatureStore(CrossSaeQueries, ExplanationReader):
    """One SAE of a store. Answers are pandas DataFrames unless said; safe to use from several threads.

    Attributes: path, sae, saes, generation, tables and time_limit, see StoreReader.
    """

    # The whole SAE

    def newer_generation(self) -> int | None:
        """Number of the generation that has taken the place of the one that was opened, if another has.

        It may be lower, where the store was removed and made anew.

        >>> store.newer_generation() is None
        True
        """
        current = publish.read_manifest(self.path)
        return None if current == self._manifest else current.generation

    @property
    def annotations(self) -> Annotations:
        """What people said of this SAE's features: labels, bookmarks, comments, lists, saved views."""
        return Annotations(self.path, self._meta["sae_hash"], d_sae=self._meta["d_sae"])

    def info(self) -> dict[str, Any]:
        """What was indexed and how much of it.

        Keys: name, sae (architecture), d_in, d_sae, k, hook_name, model, text, n_tokens, n_contexts,
        n_documents, n_activations, n_dead, n_dense, eval (the run's eval.json or None), missing (table ->
        why it is absent, one sentence), sae_hash, cache_hash, generation.

        >>> store.info()["sae"]
        'topk'
        """
        dead, dense = self._n_dead_and_dense
        return {**self._meta, "n_dead": dead, "n_dense": dense, "generation": self.generation}

    @functools.cached_property
    def _n_dead_and_dense(self) -> tuple[int, int]:
        """Counted once: a generation does not change."""
        query = "SELECT count(*) FILTER (dead), count(*) FILTER (dense) FROM sae.feature"
        dead, dense = self._rows(query)[0]
        return int(dead), int(dense)

    @property
    def feature_columns(self) -> list[str]:
        """Names of the columns of the feature table, those of the extras that are there included."""
        extras = [FEATURE_EXTRAS[name].names for name in FEATURE_EXTRAS if name in self._extras]
        return FEATURE.names + [name for names in extras for name in names if extra_of(name)]

    def features(
        self,
        columns: str | Sequence[str] | None = None,
        *,
        ranges: Mapping[str, Range] | None = None,
        flags: Mapping[str, bool] | None = None,
        text: str | None = None,
        regex: str | None = None,
        among: Sequence[int] | None = None,
        search: Sequence[str] = ("top_token",),
        labels: Mapping[int, str] | None = None,
        order_by: str = "feature",
        descending: bool = False,
        limit: int | None = None,
        offset: int = 0,
    ) -> pd.DataFrame:
        """The feature table: ``columns`` (all by default) of the features that pass the filter, in order.

        The columns of extras, such as ``explanation`` and ``explanation_score``, are among them once the
        store has them; asked for before that, they are unknown (NULL).

        >>> dense = store.features(["feature", "density"], order_by="density", descending=True, limit=3)
        >>> dense.shape, dense["density"].is_monotonic_decreasing
        ((3, 2), True)

        Args:
            ranges: column -> (lowest, highest), both included; None leaves that side open.
            flags: 'dead', 'dense' or 'explained' -> the truth value it must have.
            text: part of the top token's text, in any case.
            regex: a regular expression (RE2) found in the top token's text; ``(?i)`` ignores case.
            among: only these features, such as those of a list.
            search: where ``text`` and ``regex`` look: any of top_token, explanation, logit_top.
            labels: feature -> what people call it, where they look too.
            order_by: a column; ties go by feature, unknown values come last.

        Raises:
            UserError: a column that does not exist, a bad regular expression, a negative ``limit`` or
                ``offset``, or a search that reached the time limit.
        """
        for name, value in (("limit", limit), ("offset", offset)):
            if value is not None and value < 0:
                raise UserError(f"{name} is {value}; it must be at least 0")
        columns = [columns] if isinstance(columns, str) else columns
        names = [feature_column(name).name for name in (columns or self.feature_columns)]
        chosen = _filter(ranges, flags, text, regex, among, search, labels)
        where, values = chosen.where()
        order = f"ORDER BY {order_clause(order_by, descending)}"
        needed = [*chosen.columns, order_by]
        page = f"FROM {feature_source(needed, self._extras)} WHERE {where} {order}"
        if limit is not None or offset:
            page += " LIMIT ? OFFSET ?"
            values += [MOST_ROWS if limit is None else min(limit, MOST_ROWS), min(offset, MOST_ROWS)]
        shown = [name for name in names if extra_of(name) and name not in needed]
        if shown:  # joined to the page alone
            page = f"FROM {feature_source(shown, self._extras, f'(SELECT * {page})')} {order}"
        return self._frame(f"SELECT {', '.join(names)} {page}", values, timed=chosen.searches)

    def count_features(
        self, *, ranges: Mapping[str, Range] | None = None, flags: Mapping[str, bool] | None = None,
        text: str | None = None, regex: str | None = None, among: Sequence[int] | None = None,
        search: Sequence[str] = ("top_token",), labels: Mapping[int, str] | None = None,
    ) -> int:  # fmt: skip
        """How many features pass the filter.

        >>> bool(store.count_features(flags={"dead": False}) == (store.features()["n_act"] > 0).sum())
        True
        """
        chosen = _filter(ranges, flags, text, regex, among, search, labels)
        where, values = chosen.where()
        query = f"SELECT count(*) FROM {feature_source(chosen.columns, self._extras)} WHERE {where}"
        return int(self._rows(query, values, timed=chosen.searches)[0][0])

    def neighbors_in_order(
        self,
        feature: int,
        *,
        ranges: Mapping[str, Range] | None = None,
        flags: Mapping[str, bool] | None = None,
        text: str | None = None,
        regex: str | None = None,
        among: Sequence[int] | None = None,
        search: Sequence[str] = ("top_token",),
        labels: Mapping[int, str] | None = None,
        order_by: str = "feature",
        descending: bool = False,
    ) -> tuple[int | None, int | None]:
        """The features before and after ``feature`` in the filtered, sorted list; None at its ends.

        (None, None) when ``feature`` does not pass the filter itself.

        >>> store.neighbors_in_order(1)
        (0, 2)
        """
        chosen = _filter(ranges, flags, text, regex, among, search, labels)
        where, values = chosen.where()
        order = order_clause(order_by, descending)
        source = feature_source([*chosen.columns, order_by], self._extras)
        listed = (
            "SELECT feature, lag(feature) OVER w AS before, lead(feature) OVER w AS after "
            f"FROM {source} WHERE {where} WINDOW w AS (ORDER BY {order})"
        )
        values.append(self._known(feature))
        query = f"SELECT before, after FROM ({listed}) WHERE feature = ?"
        rows = self._rows(query, values, timed=chosen.searches)
        return rows[0] if rows else (None, None)

    # One feature

    def feature(self, feature: int) -> dict[str, Any]:
        """The row of one feature.

        >>> store.feature(3)["feature"]
        3

        Raises:
            UserError: no such feature.
        """
        names = self.feature_columns
        query = f"SELECT {', '.join(names)} FROM {feature_source(names, self._extras)} WHERE feature = ?"
        rows = self._rows(query, [self._known(feature)])
        return dict(zip(names, rows[0], strict=True))

    def tokens(self, feature: int, role: str = "active") -> pd.DataFrame:
        """Tokens it fires on (or the 'previous' or 'next' ones), most often first.

        Columns token, text, n, p_token_given_fire, p_fire_given_token, lift.

        >>> bool((store.tokens(3)["n"] > 0).all())
        True
        """
        self._require("feature_token")
        return self._with_text(
            self._frame(
                "SELECT token, n, p_token_given_fire, p_fire_given_token, lift FROM sae.feature_token "
                "WHERE feature = ? AND role = ? ORDER BY rank",
                [self._known(feature), one_of(TOKEN_ROLES, role, "role of a token")],
            )
        )

    def examples(self, feature: int, group: str | None = None) -> pd.DataFrame:
        """Stored examples, one a row, by group and rank.

        Columns group, rank, ctx, pos, value, doc, fold, weight, label, start, tokens, pieces, acts.
        ``group`` 'top' holds the largest activation of each of the contexts in which it fires hardest,
        'random' firings drawn uniformly, 'decile-1' to 'decile-10' some of each tenth of its firings by
        rising activation, 'near-miss' and 'negative' windows in which it stays silent. ``weight`` is the
        number of firings that an example stands for; ``fold``, 0 or 1, is that of the document. ``tokens``,
        ``pieces`` and ``acts`` are lists over the window, which begins at position ``start``; joined, the
        pieces are the decoded window. Without contexts the lists are empty.

        >>> bool((store.examples(3, "top")["value"] <= store.feature(3)["max_act"]).all())
        True

        Raises:
            UserError: no such feature or group.
        """
        if group is not None and group not in GROUPS:
            raise UserError(f"{group!r} is not a group of examples; {nearest(group, GROUPS)}")
        import pandas as pd

        values, picked = [self._known(feature)], ""
        if group is not None:
            values, picked = [*values, GROUPS[group]], " AND grp = ?"
        rows = self._columns(
            "SELECT grp, rank, ctx, pos, value, doc, fold, weight, start, tokens, acts FROM sae.example "
            f"WHERE feature = ?{picked} ORDER BY grp, rank",
            values,
        )
        names = {number: name for name, number in GROUPS.items()}
        tokens = [list(map(int, one)) for one in rows["tokens"]]
        docs = [None if pd.isna(doc) else int(doc) for doc in rows["doc"]]
        labels = self._labels({doc for doc in docs if doc is not None})
        return pd.DataFrame({
            "group": [names[number] for number in rows["grp"].tolist()],
            **{name: rows[name] for name in ("rank", "ctx", "pos", "value", "doc", "fold", "weight")},
            "label": [None if doc is None else labels.get(doc) for doc in docs],
            "start": rows["start"], "tokens": tokens,
            "pieces": [self._pieces(one) for one in tokens], "acts": [one.tolist() for one in rows["acts"]],
        })  # fmt: skip

    def logits(self, feature: int) -> pd.DataFrame:
        """Promoted (+1) and suppressed (-1) tokens: sign, rank, token, text, value (logits per unit).

        >>> sorted(set(store.logits(3)["sign"]))
        [-1, 1]
        """
        self._require("logit")
        return self._with_text(
            self._frame(
                "SELECT sign, rank, token, value FROM sae.logit WHERE feature = ? ORDER BY sign DESC, rank",
                [self._known(feature)],
            )
        )

    def neighbors(self, feature: int, kind: str = "decoder") -> pd.DataFrame:
        """The nearest other features, nearest first.

        ``kind`` 'decoder' or 'encoder': other, cosine of the directions. 'cofire': other, score (tokens on
        which both fire / on which either does), n_both. 'correlation': other, score, n_both.

        >>> bool(store.neighbors(3)["cosine"].is_monotonic_decreasing)
        True
        """
        directions = kind in ("decoder", "encoder")
        columns = "score AS cosine" if directions else "score, n_both"
        return self._frame(
            f"SELECT other, {columns} FROM sae.neighbor WHERE kind = ? AND feature = ? ORDER BY rank",
            [one_of(NEIGHBOR_KINDS, kind, "kind of neighbor"), self._known(feature)],
        )

    def context(self, ctx: int) -> dict[str, Any]:
        """One context: ctx, n_tokens, tokens, pieces, docs (one a token), doc and label (of the first token).

        >>> len(store.context(0)["tokens"]) == store.context(0)["n_tokens"]
        True

        Raises:
            UserError: no such context, or a store without contexts.
        """
        self._require("context")
        ctx = self._known_context(ctx)
        rows = self._rows("SELECT n_tokens, tokens, docs FROM txt.context WHERE ctx = ?", [ctx])
        n_tokens, tokens, docs = rows[0]
        return {
            "ctx": ctx, "n_tokens": n_tokens, "tokens": tokens, "pieces": self._pieces(tokens),
            "docs": docs, "doc": docs[0], "label": self._labels(docs[:1]).get(docs[0]),
        }  # fmt: skip

    def quantiles(self, feature: int) -> pd.DataFrame:
        """Quantiles of its activations: q, value. Empty for a dead feature."""
        import pandas as pd

        rows = self._rows("SELECT qs FROM sae.quantile WHERE feature = ?", [self._known(feature)])
        return pd.DataFrame({"q": QUANTILE_GRID if rows else (), "value": rows[0][0] if rows else ()})

    def positions(self, feature: int) -> pd.DataFrame:
        """Where in the context it fires: lo, hi (not included), n, share of firings, p_fire."""
        import numpy as np
        import pandas as pd

        self._require("position")
        rows = self._rows("SELECT counts FROM sae.position WHERE feature = ?", [self._known(feature)])
        n, there = np.array(rows[0][0] if rows else []), np.array(self._meta["position_rows"])
        edges = -(-np.arange(len(there) + 1) * self._meta["ctx_len"] // len(there))
        lo, hi = edges[: len(n)], edges[1 : len(n) + 1]
        shares = {"share": n / max(n.sum(), 1), "p_fire": n / np.maximum(there[: len(n)], 1)}
        return pd.DataFrame({"lo": lo, "hi": hi, "n": n, **shares})

    def labels(self, feature: int) -> pd.DataFrame:
        """Labels of the documents it fires in, most often first: label, n, p_label_given_fire, lift."""
        self._require("feature_label")
        return self._frame(
            "SELECT label, n, p_label_given_fire, lift FROM sae.feature_label WHERE feature = ? "
            "ORDER BY rank",
            [self._known(feature)],
        )

    def train_metrics(self) -> pd.DataFrame:
        """The run's metrics as it was trained: step, name, value."""
        self._require("train_metric")
        return self._frame("SELECT step, name, value FROM sae.train_metric ORDER BY step, name")

    def metrics_wide(self) -> pd.DataFrame:
        """The same, a row for each reported step and a column for each metric.

        >>> store.metrics_wide()["step"].is_monotonic_increasing
        True
        """
        wide = self.train_metrics().pivot(index="step", columns="name", values="value")
        return wide.rename_axis(columns=None).reset_index()

    train_course = renamed("train_course", metrics_wide)


def _filter(
    ranges: Mapping[str, Range] | None, flags: Mapping[str, bool] | None, text: str | None,
    regex: str | None, among: Sequence[int] | None, search: Sequence[str], labels: Mapping[int, str] | None,
) -> FeatureFilter:  # fmt: skip
    return FeatureFilter(
        ranges=ranges or {}, flags=flags or {}, text=text, regex=regex, among=among, search=search,
        labels=labels or {},
    )  # fmt: skip
