"""What a page shows, as a URL: the one place where query parameters are read and written.

A view names the SAE, which of its features are listed and in which order, and how the examples of one
feature are shown. Every page carries the whole view in its URL, so a reload, a bookmark, Back, and the
steps to the previous and next feature all mean what the person saw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias
from urllib.parse import urlencode

from saebench.store.schema import HIST_BINS, HIST_KINDS, NEIGHBOR_KINDS, TOKEN_ROLES

LABEL = "label"
"""The column of the table that people write, not the store."""

Shown: TypeAlias = Literal["any", "hide", "only"]
Range: TypeAlias = tuple[float | None, float | None]
"""Lowest and highest, both included; None leaves that side open."""

SHOWN: tuple[Shown, ...] = ("any", "hide", "only")
WINDOWS = (4, 8, 16, 0)
"""Tokens shown on each side of the strongest one; 0 shows all that the store keeps."""
COLORS = ("linear", "sqrt", "rank")
"""How the strength of a color grows with an activation."""
ABOVE = (0, 10, 25, 50, 75)
"""Percent of the largest activation below which a token stays uncolored."""
FOLDED = ("explanations", "verdicts", "where")
"""Parts of a page that are closed, and ask the store nothing, until the URL opens them."""

NAMES = {
    "text": "q", "regex": "re", "log_density": "density", "max_act": "max", "token_share": "share",
    "loss_effect": "effect", "descending": "desc", "histogram": "hist",
}  # fmt: skip
"""Fields that are called otherwise in the URL."""

RANGES = {
    "max_act": "max_act", "token_share": "top_token_share", "selectivity": "top_token_p_fire",
    "similarity": "dec_max_cos", "loss_effect": "loss_effect", "score": "explanation_score",
}  # fmt: skip
"""Field -> the column of the feature table that it bounds as it is."""
SEARCHED = ("top_token", "explanation")
"""The columns in which a person's words are looked for; labels are searched as well."""
MOST_AMONG = 500
"""Features that a URL names at most."""


@dataclass(frozen=True, kw_only=True)
class View:
    sae: str
    text: str = ""
    """Part of the top token, the explanation or the label."""
    regex: bool = False
    """Whether ``text`` is a regular expression."""
    log_density: Range | None = None
    """Bounds on log10 of the density; a lower one leaves out dead features."""
    max_act: Range | None = None
    token_share: Range | None = None
    selectivity: Range | None = None
    similarity: Range | None = None
    loss_effect: Range | None = None
    score: Range | None = None
    dead: Shown = "any"
    dense: Shown = "any"
    explained: Shown = "any"
    bookmarked: bool = False
    labeled: bool = False
    list: str = ""
    """Only the features of this list."""
    among: tuple[int, ...] = ()
    """Only these features."""
    columns: tuple[str, ...] = ()
    """Columns of the table; none stands for those that it has by itself."""
    sort: str = "feature"
    descending: bool = False
    page: int = 1
    group: str = "top"
    window: int = 16
    histogram: str = "value"
    bin: int | None = None
    """A bar of the histogram, whose activations are shown instead of a group."""
    role: str = "active"
    near: str = "decoder"
    colors: str = "linear"
    above: int = 0
    lines: bool = False
    """Whether line breaks break the line."""
    distinct: bool = False
    """Whether equal windows are shown once."""
    open: tuple[str, ...] = ()

    @classmethod
    def from_query(cls, params: Mapping[str, str], *, sae: str, columns: Sequence[str]) -> View:
        """Read a view of ``sae``; a value that cannot be meant is left at its default.

        ``columns`` are those that the features can be sorted by.
        """
        sort = params.get("sort", "feature")
        bin = whole(params.get("bin"))
        bounds = {name: _range(params.get(NAMES.get(name, name))) for name in ("log_density", *RANGES)}
        return cls(
            sae=sae,
            text=params.get("q", ""),
            regex=params.get("re") == "1",
            **bounds,
            dead=_one_of(SHOWN, params.get("dead")),
            dense=_one_of(SHOWN, params.get("dense")),
            explained=_one_of(SHOWN, params.get("explained")),
            bookmarked=params.get("bookmarked") == "1",
            labeled=params.get("labeled", params.get("labelled")) == "1",
            list=params.get("list", ""),
            among=_features(params.get("among")),
            columns=_names(params.get("columns"), (*columns, LABEL)),
            sort=sort if sort in columns else "feature",
            descending=params.get("desc") == "1",
            page=max(whole(params.get("page")) or 1, 1),
            group=params.get("group", "top"),
            window=_one_of((16, *WINDOWS), whole(params.get("window"))),
            histogram=_one_of(tuple(HIST_KINDS), params.get("hist")),
            bin=bin if bin is not None and bin < HIST_BINS else None,
            role=_one_of(tuple(TOKEN_ROLES), params.get("role")),
            near=_one_of(tuple(NEIGHBOR_KINDS), params.get("near")),
            colors=_one_of(COLORS, params.get("colors", params.get("colours"))),
            above=_one_of(ABOVE, whole(params.get("above"))),
            lines=params.get("lines") == "1",
            distinct=params.get("distinct") == "1",
            open=_names(params.get("open"), FOLDED),
        )

    def query(self, **more: int | str) -> dict[str, str]:
        """The query parameters that ``from_query`` reads back; defaults are left out."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {f.name for f in fields(self) if f.name == "sae" or given[f.name] != f.default}
        own = {NAMES.get(name, name): _written(name, given[name]) for name in given if name in changed}
        return own | {name: str(value) for name, value in more.items()}

    def url(self, page: str, **more: int | str) -> str:
        """A link to ``page`` (its path in the URL), relative to where the app is served."""
        return f"{page}?{urlencode(self.query(**more))}"

    def lists_all(self) -> bool:
        """Whether nothing is filtered out."""
        chosen = (self.list, self.bookmarked, self.labeled)
        return not any(chosen) and not any(self.filters().values())

    def cleared(self) -> View:
        """The view without its filters, in the same order and with the same columns."""
        return View(
            sae=self.sae, sort=self.sort, descending=self.descending, columns=self.columns, group=self.group,
            window=self.window, histogram=self.histogram, role=self.role, near=self.near,
            colors=self.colors, above=self.above, lines=self.lines, distinct=self.distinct, open=self.open,
        )  # fmt: skip

    def toggled(self, part: str) -> View:
        """The view with a folded part opened, or closed again."""
        others = tuple(name for name in self.open if name != part)
        return replace(self, open=others if part in self.open else (*self.open, part))

    def sorted_by(self, column: str) -> View:
        """The view after a click on a column's heading: big values first, then small ones."""
        descending = not self.descending if column == self.sort else column != "feature"
        return replace(self, sort=column, descending=descending, page=1)

    def filters(self) -> dict[str, Any]:
        """The listed features, in the words of ``FeatureStore.features``; without what people said of them.

        ``Here.filters`` adds that.
        """
        ranges: dict[str, Range] = {}
        if self.log_density is not None:
            low, high = self.log_density
            ranges["density"] = (None if low is None else 10**low, None if high is None else 10**high)
        for name, column in RANGES.items():
            if (chosen := getattr(self, name)) is not None:
                ranges[column] = chosen
        wanted = {"dead": self.dead, "dense": self.dense, "explained": self.explained}
        flags = {name: shown == "only" for name, shown in wanted.items() if shown != "any"}
        words = {"regex" if self.regex else "text": self.text, "search": SEARCHED} if self.text else {}
        return {"ranges": ranges or None, "flags": flags or None, "among": self.among or None, **words}

    def order(self) -> dict[str, Any]:
        return {"order_by": self.sort, "descending": self.descending}


def whole(value: str | None) -> int | None:
    """A whole number from a URL, or None."""
    return (
        int(value) if value is not None and value.isascii() and value.isdigit() and len(value) < 12 else None
    )


def _one_of(allowed: Sequence[Any], value: Any) -> Any:
    return value if value in allowed else allowed[0]


def _range(value: str | None) -> Range | None:
    low, dots, high = (value or "").partition("..")
    try:
        bounds = float(low) if low else None, float(high) if high else None
    except ValueError:
        return None
    given = [bound for bound in bounds if bound is not None]
    if not dots or not given or not all(map(math.isfinite, given)) or given != sorted(given):
        return None
    return bounds


def _names(value: str | None, known: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in (value or "").split(",") if name in known))


def _features(value: str | None) -> tuple[int, ...]:
    """Numbers of features from a URL: 3,17,40."""
    numbers = [whole(part) for part in (value or "").split(",")]
    return tuple(dict.fromkeys(number for number in numbers if number is not None))[:MOST_AMONG]


def _written(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    if name in ("among", "columns", "open"):
        return ",".join(map(str, value))
    if isinstance(value, tuple):
        return "..".join("" if bound is None else f"{bound:g}" for bound in value)
    return str(value)
