"""Which features, in which order: a filter as data, turned into SQL with parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from saebench.errors import UserError
from saebench.store.limits import check_pattern
from saebench.store.schema import FEATURE, FEATURE_EXTRAS, extra_of, feature_column

Range = tuple[float | None, float | None]


@dataclass(frozen=True, kw_only=True)
class FeatureFilter:
    """A selection of features.

    Attributes:
        ranges: column -> (lowest, highest), both included; None leaves that side open.
        flags: column -> the truth value it must have ('dead', 'dense').
        text: part of the top token's text, in any case.
        regex: a regular expression (RE2) found in the top token's text.
        among: only these features, such as those of a list.
    """

    ranges: Mapping[str, Range] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)
    text: str | None = None
    regex: str | None = None
    among: Sequence[int] | None = None

    @property
    def searches(self) -> bool:
        """Whether a person's words decide how long it takes."""
        return bool(self.text) or self.regex is not None

    @property
    def columns(self) -> list[str]:
        """The columns that it looks at, the top token's text aside."""
        return [*self.ranges, *self.flags]

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
            column, kind = name, feature_column(name).type
            if kind != "BOOLEAN":
                flags = [c.name for c in FEATURE.columns if c.type == "BOOLEAN"]
                raise UserError(f"{column!r} is not a flag; the flags are {', '.join(flags)}")
            conditions.append(f"{column} = ?")
            values.append(bool(wanted))
        if self.text:
            conditions.append("contains(lower(top_token), lower(?))")
            values.append(self.text)
        if self.regex is not None:
            conditions.append("regexp_matches(top_token, ?)")
            values.append(check_pattern(self.regex))
        if self.among is not None:
            conditions.append("feature IN (SELECT unnest(?::UBIGINT[]))")
            values.append([int(feature) for feature in self.among if feature >= 0])
        return " AND ".join(conditions), values


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
        f"{extra_of(column)}.{column}" if extra_of(column) in extras
        else f"NULL::{feature_column(column).type} AS {column}"
        for column in columns
    ]  # fmt: skip
    joins = "".join(
        f" LEFT JOIN {name}.{FEATURE_EXTRAS[name].name} AS {name} USING (feature)" for name in joined if name
    )
    return f"(SELECT f.*, {', '.join(values)} FROM {table} AS f{joins})"
