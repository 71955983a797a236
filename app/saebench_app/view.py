"""What all pages share in their URL: which features are listed, in which order, and how examples are shown.

Every page carries the whole view in its URL, so a reload, a bookmark, Back, and the steps to the previous and
next feature all mean what the person saw. What one page alone has is a `Query` in its own module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, replace
from typing import Any, Literal, TypeAlias
from urllib.parse import urlencode

from saebench.store.schema import HIST_BINS, HIST_KINDS, NEIGHBOR_KINDS, TOKEN_ROLES
from saebench_app.url import (
    Bounds,
    Choice,
    Flag,
    Names,
    Query,
    Range,
    Text,
    Whole,
    Wholes,
    Written,
    parameter,
)

LABEL = "label"
"""The column of the table that people write, not the store."""

Shown: TypeAlias = Literal["any", "hide", "only"]

SHOWN: tuple[Shown, ...] = ("any", "hide", "only")
WINDOWS = (4, 8, 16, 0)
"""Tokens shown on each side of the strongest one; 0 shows all that the store keeps."""
COLORS = ("linear", "sqrt", "rank")
"""How the strength of a color grows with an activation."""
ABOVE = (0, 10, 25, 50, 75)
"""Percent of the largest activation below which a token stays uncolored."""
FOLDED = ("explanations", "verdicts", "where")
"""Parts of a page that are closed, and ask the store nothing, until the URL opens them."""

RANGES = {
    "max_act": "max_act",
    "token_share": "top_token_share",
    "selectivity": "top_token_p_fire",
    "similarity": "dec_max_cos",
    "loss_effect": "loss_effect",
    "score": "explanation_score",
    "norm_share": "norm_share",
}
"""Field -> the column of the feature table that it bounds as it is."""
SEARCHED = ("top_token", "explanation")
"""The columns that a search looks in; labels are searched as well."""
MOST_AMONG = 500
"""Features that a URL names at most."""


@dataclass(frozen=True, kw_only=True)
class View(Query):
    sae: str = parameter(MISSING, Text())
    text: str = parameter("", Text(), name="q")
    """Part of the top token, the explanation or the label."""
    regex: bool = parameter(False, Flag(), name="re")
    """Whether ``text`` is a regular expression."""
    log_density: Range | None = parameter(None, Bounds(), name="density")
    """Bounds on log10 of the density; a lower one leaves out dead features."""
    max_act: Range | None = parameter(None, Bounds(), name="max")
    token_share: Range | None = parameter(None, Bounds(), name="share")
    selectivity: Range | None = parameter(None, Bounds())
    similarity: Range | None = parameter(None, Bounds())
    loss_effect: Range | None = parameter(None, Bounds(), name="effect")
    score: Range | None = parameter(None, Bounds())
    norm_share: Range | None = parameter(None, Bounds(), name="norm")
    """Bounds on the share of a crosscoder's last site in the decoder norm."""
    dead: Shown = parameter("any", Choice(SHOWN))
    dense: Shown = parameter("any", Choice(SHOWN))
    explained: Shown = parameter("any", Choice(SHOWN))
    exclusive: Shown = parameter("any", Choice(SHOWN))
    bookmarked: bool = parameter(False, Flag())
    labeled: bool = parameter(False, Flag(), old=["labelled"])
    list: str = parameter("", Text())
    """Only the features of this list."""
    among: tuple[int, ...] = parameter((), Wholes(MOST_AMONG))
    """Only these features."""
    columns: tuple[str, ...] = parameter((), Names())
    """Columns of the table; none stands for the default ones."""
    sort: str = parameter("feature", Choice())
    descending: bool = parameter(False, Flag(), name="desc")
    page: int = parameter(1, Whole(1))
    group: str = parameter("top", Text())
    window: int = parameter(16, Choice(WINDOWS))
    histogram: str = parameter(next(iter(HIST_KINDS)), Choice(tuple(HIST_KINDS)), name="hist")
    bin: int | None = parameter(None, Choice(range(HIST_BINS)))
    """A bar of the histogram, whose activations are shown instead of a group."""
    role: str = parameter(next(iter(TOKEN_ROLES)), Choice(tuple(TOKEN_ROLES)))
    near: str = parameter(next(iter(NEIGHBOR_KINDS)), Choice(tuple(NEIGHBOR_KINDS)))
    colors: str = parameter("linear", Choice(COLORS), old=["colours"])
    above: int = parameter(0, Choice(ABOVE))
    lines: bool = parameter(False, Flag())
    """Whether line breaks are shown as new lines."""
    distinct: bool = parameter(False, Flag())
    """Whether duplicate examples are hidden."""
    open: tuple[str, ...] = parameter((), Names(FOLDED))

    @classmethod
    def from_query(
        cls, params: Mapping[str, str | Sequence[str]], *, sae: str, columns: Sequence[str]
    ) -> View:
        """Read a view of ``sae``; ``columns`` are those that the features can be sorted by."""
        return cls.read(params, allowed={"sort": columns, "columns": (*columns, LABEL)}, sae=sae)

    def query(self, *own: Query, **more: int | str) -> Written:
        """The parameters of the view, with ``own``, those of a page, and ``more``, single ones."""
        written = super().query()
        for query in own:
            written |= query.query()
        return written | {name: str(value) for name, value in more.items()}

    def url(self, page: str, *own: Query, **more: int | str) -> str:
        """A link to ``page`` (its path in the URL), relative to where the app is served; see ``query``."""
        return f"{page}?{urlencode(self.query(*own, **more), doseq=True)}"

    def lists_all(self) -> bool:
        """Whether nothing is filtered out."""
        chosen = (self.list, self.bookmarked, self.labeled)
        return not any(chosen) and not any(self.filters().values())

    def cleared(self) -> View:
        """The view without its filters, in the same order and with the same columns."""
        return View(
            sae=self.sae,
            sort=self.sort,
            descending=self.descending,
            columns=self.columns,
            group=self.group,
            window=self.window,
            histogram=self.histogram,
            role=self.role,
            near=self.near,
            colors=self.colors,
            above=self.above,
            lines=self.lines,
            distinct=self.distinct,
            open=self.open,
        )

    def toggled(self, part: str) -> View:
        """The view with a folded part opened, or closed again."""
        others = tuple(name for name in self.open if name != part)
        return replace(self, open=others if part in self.open else (*self.open, part))

    def sorted_by(self, column: str) -> View:
        """The view after a click on a column's heading: big values first, then small ones."""
        descending = not self.descending if column == self.sort else column != "feature"
        return replace(self, sort=column, descending=descending, page=1)

    def filters(self) -> dict[str, Any]:
        """The listed features, as arguments of ``FeatureStore.features``, without annotations.

        ``Here.filters`` adds these.
        """
        ranges: dict[str, Range] = {}
        if self.log_density is not None:
            low, high = self.log_density
            ranges["density"] = (None if low is None else 10**low, None if high is None else 10**high)
        for name, column in RANGES.items():
            if (chosen := getattr(self, name)) is not None:
                ranges[column] = chosen
        wanted = {name: getattr(self, name) for name in ("dead", "dense", "explained", "exclusive")}
        flags = {name: shown == "only" for name, shown in wanted.items() if shown != "any"}
        words = {"regex" if self.regex else "text": self.text, "search": SEARCHED} if self.text else {}
        return {"ranges": ranges or None, "flags": flags or None, "among": self.among or None, **words}

    def order(self) -> dict[str, Any]:
        return {"order_by": self.sort, "descending": self.descending}


@dataclass(frozen=True, kw_only=True)
class Focus(Query):
    """The feature that a page is about."""

    f: int | None = parameter(None, Whole())
