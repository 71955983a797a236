"""FeatureReader: the feature table, one row per feature, filtered and sorted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from saebench.store.connection import StoreConnection, limit_of
from saebench.store.filters import FeatureFilter, Range, feature_source, order_clause
from saebench.store.schema import FEATURE, FEATURE_EXTRAS, extra_of, feature_column

if TYPE_CHECKING:
    import pandas as pd


class FeatureReader:
    """Owns the table feature, and joins to it the tables of extras that have one row per feature."""

    def __init__(self, connection: StoreConnection) -> None:
        self._connection = connection

    @property
    def columns(self) -> list[str]:
        extras = [FEATURE_EXTRAS[name].names for name in FEATURE_EXTRAS if name in self._connection.extras]
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
        store has that extra; before, they are NULL when asked for by name.

        >>> dense = store.features(["feature", "density"], order_by="density", descending=True, limit=3)
        >>> dense.shape, dense["density"].is_monotonic_decreasing
        ((3, 2), True)

        Args:
            ranges: column -> (lowest, highest), both included; None leaves that side open.
            flags: 'dead', 'dense' or 'explained' -> the truth value it must have.
            text: part of the top token's text; case does not matter.
            regex: a regular expression (RE2) found in the top token's text; ``(?i)`` ignores case.
            among: only these features, such as those of a list.
            search: columns that ``text`` and ``regex`` search: any of top_token, explanation, logit_top.
            labels: feature -> its label by a user; ``text`` and ``regex`` search these too.
            order_by: a column; ties are ordered by feature, NULL comes last.

        Raises:
            UserError: a column that does not exist, a bad regular expression, a negative ``limit`` or
                ``offset``, or a search that reached the time limit.
        """
        n_rows, n_skipped = limit_of("limit", limit), limit_of("offset", offset)
        columns = [columns] if isinstance(columns, str) else columns
        names = [feature_column(name).name for name in (columns or self.columns)]
        chosen = _filter(ranges, flags, text, regex, among, search, labels)
        where, values = chosen.where()
        extras = self._connection.extras
        order = f"ORDER BY {order_clause(order_by, descending)}"
        needed = [*chosen.columns, order_by]
        page = f"FROM {feature_source(needed, extras)} WHERE {where} {order}"
        if limit is not None or offset:
            page += " LIMIT ? OFFSET ?"
            values += [n_rows, n_skipped]
        of_extras = [name for name in names if extra_of(name) and name not in needed]
        if of_extras:  # joined to the page only, not to all features
            page = f"FROM {feature_source(of_extras, extras, f'(SELECT * {page})')} {order}"
        query = f"SELECT {', '.join(names)} {page}"
        return self._connection.frame(query, values, timed=chosen.searches)

    def count_features(
        self,
        *,
        ranges: Mapping[str, Range] | None = None,
        flags: Mapping[str, bool] | None = None,
        text: str | None = None,
        regex: str | None = None,
        among: Sequence[int] | None = None,
        search: Sequence[str] = ("top_token",),
        labels: Mapping[int, str] | None = None,
    ) -> int:
        """How many features pass the filter; its arguments are those of ``features``.

        >>> bool(store.count_features(flags={"dead": False}) == (store.features()["n_act"] > 0).sum())
        True

        Raises:
            UserError: see ``features``.
        """
        chosen = _filter(ranges, flags, text, regex, among, search, labels)
        where, values = chosen.where()
        source = feature_source(chosen.columns, self._connection.extras)
        query = f"SELECT count(*) FROM {source} WHERE {where}"
        return int(self._connection.rows(query, values, timed=chosen.searches)[0][0])

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

        (None, None) when ``feature`` does not pass the filter itself. The arguments are those of
        ``features``.

        >>> store.neighbors_in_order(1)
        (0, 2)

        Raises:
            UserError: no such feature; see ``features``.
        """
        chosen = _filter(ranges, flags, text, regex, among, search, labels)
        where, values = chosen.where()
        order = order_clause(order_by, descending)
        source = feature_source([*chosen.columns, order_by], self._connection.extras)
        listed = (
            "SELECT feature, lag(feature) OVER w AS before, lead(feature) OVER w AS after "
            f"FROM {source} WHERE {where} WINDOW w AS (ORDER BY {order})"
        )
        values.append(self._connection.require_feature(feature))
        query = f"SELECT before, after FROM ({listed}) WHERE feature = ?"
        rows = self._connection.rows(query, values, timed=chosen.searches)
        return rows[0] if rows else (None, None)

    def feature(self, feature: int) -> dict[str, Any]:
        """The row of one feature: column -> value.

        >>> store.feature(3)["feature"]
        3

        Raises:
            UserError: no such feature.
        """
        names = self.columns
        source = feature_source(names, self._connection.extras)
        query = f"SELECT {', '.join(names)} FROM {source} WHERE feature = ?"
        rows = self._connection.rows(query, [self._connection.require_feature(feature)])
        return dict(zip(names, rows[0], strict=True))


def _filter(
    ranges: Mapping[str, Range] | None,
    flags: Mapping[str, bool] | None,
    text: str | None,
    regex: str | None,
    among: Sequence[int] | None,
    search: Sequence[str],
    labels: Mapping[int, str] | None,
) -> FeatureFilter:
    return FeatureFilter(
        ranges=ranges or {},
        flags=flags or {},
        text=text,
        regex=regex,
        among=among,
        search=search,
        labels=labels or {},
    )
