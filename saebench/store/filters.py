"""Filters and orders of features as data, and their translation to SQL with parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from saebench.core.errors import UserError
from saebench.store.limits import check_pattern
from saebench.store.schema import FEATURE, FEATURE_EXTRAS, extra_of, feature_column

Range = tuple[float | None, float | None]

EXPLAINED = "explained"
"""A flag that is not a column: whether there is an explanation."""


@dataclass(frozen=True, kw_only=True)
class FeatureFilter:
    """A selection of features.

    Attributes:
        ranges: column -> (lowest, highest), both included; None leaves that side open.
        flags: column -> the truth value it must have ('dead', 'dense'), and 'explained': whether it has a
            scored explanation.
        text: part of a text of the feature, in any case.
        regex: a regular expression (RE2) found in a text of the feature.
        among: only these features, such as those of a list.
        search: the columns whose texts are searched.
        labels: feature -> its label by a user; searched as well.
    """

    ranges: Mapping[str, Range] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)
    text: str | None = None
    regex: str | None = None
    among: Sequence[int] | None = None
    search: Sequence[str] = ("top_token",)
    labels: Mapping[int, str] = field(default_factory=dict)

    @property
    def searches(self) -> bool:
        """Whether the filter searches text, so that user input decides how long it takes."""
        return bool(self.text) or self.regex is not None

    @property
    def columns(self) -> list[str]:
        """The columns that it reads."""
        flags = ["explanation" if name == EXPLAINED else name for name in self.flags]
        return [*self.ranges, *flags, *(self.search if self.searches else ())]

    def where(self) -> tuple[str, list[object]]:
        """``(condition, parameters)``; names come from the schema, values are always parameters.

        Raises:
            UserError: a column that does not exist or is not of the right kind, a bad regular expression.
        """
        conditions, values = ["true"], list[object]()
        for name, (low, high) in self.ranges.items():
            column, kind = name, feature_column(name).type
            if kind in ("VARCHAR", "BOOLEAN"):
                raise UserError(
                    f"{column!r} is not a number, so it has no range; filter it with text or flags"
                )
            for bound, comparison in ((low, ">="), (high, "<=")):
                if bound is not None:
                    conditions.append(f"{column} {comparison} ?")
                    values.append(float(bound))
        for name, wanted in self.flags.items():
            if name == EXPLAINED:
                conditions.append("(explanation IS NOT NULL) = ?")
                values.append(bool(wanted))
                continue
            column, kind = name, feature_column(name).type
            if kind != "BOOLEAN":
                flags = [c.name for c in FEATURE.columns if c.type == "BOOLEAN"]
                raise UserError(f"{column!r} is not a flag; the flags are {', '.join([*flags, EXPLAINED])}")
            conditions.append(f"{column} = ?")
            values.append(bool(wanted))
        if self.text:
            self._search("contains(lower({}), lower(?))", self.text, conditions, values)
        if self.regex is not None:
            self._search("regexp_matches({}, ?)", check_pattern(self.regex), conditions, values)
        if self.among is not None:
            conditions.append("feature IN (SELECT unnest(?::UBIGINT[]))")
            values.append([int(feature) for feature in self.among if feature >= 0])
        return " AND ".join(conditions), values

    def _search(self, test: str, wanted: str, conditions: list[str], values: list[object]) -> None:
        """Add a condition: one of the texts, or the label, passes the test."""
        tests = []
        for name in self.search:
            column = feature_column(name)
            if column.type != "VARCHAR":
                raise UserError(f"{name!r} is not text, so it cannot be searched; give it a range")
            tests.append(test.format(column.name))
            values.append(wanted)
        if self.labels:
            named = "SELECT unnest(?::UBIGINT[]) AS named, unnest(?::VARCHAR[]) AS label"
            tests.append(f"feature IN (SELECT named FROM ({named}) WHERE {test.format('label')})")
            values += [list(self.labels), list(self.labels.values()), wanted]
        conditions.append(f"({' OR '.join(tests) or 'false'})")


def order_clause(order_by: str, descending: bool) -> str:
    """ORDER BY that puts unknown values last and decides ties by the number of the feature."""
    column = feature_column(order_by).name
    return f"{column} {'DESC' if descending else 'ASC'} NULLS LAST, feature"


def feature_source(used: Iterable[str], extras: Collection[str], table: str = "sae.feature") -> str:
    """The feature table for FROM, or a part of it, with those columns of ``used`` that come from extras.

    Only extras that are used are joined; a column of one that the store has not (it has ``extras``) is NULL.

    Raises:
        UserError: a column that does not exist.
    """
    columns = [column for column in dict.fromkeys(used) if extra_of(feature_column(column).name)]
    if not columns:
        return table
    joined = dict.fromkeys(name for column in columns if (name := extra_of(column)) in extras)
    values = [
        f"{extra_of(column)}.{column}"
        if extra_of(column) in extras
        else f"NULL::{feature_column(column).type} AS {column}"
        for column in columns
    ]
    joins = "".join(
        f" LEFT JOIN {name}.{FEATURE_EXTRAS[name].name} AS {name} USING (feature)" for name in joined if name
    )
    return f"(SELECT f.*, {', '.join(values)} FROM {table} AS f{joins})"
