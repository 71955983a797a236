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

Shown: TypeAlias = Literal["any", "hide", "only"]
Range: TypeAlias = tuple[float | None, float | None]
"""Lowest and highest, both included; None leaves that side open."""

SHOWN: tuple[Shown, ...] = ("any", "hide", "only")
WINDOWS = (4, 8, 16, 0)
"""Tokens shown on each side of the strongest one; 0 shows all that the store keeps."""

NAMES = {"text": "q", "log_density": "density", "max_act": "max", "descending": "desc"}
"""Fields that are called otherwise in the URL."""

MOST_AMONG = 500
"""Features that a URL names at most."""


@dataclass(frozen=True, kw_only=True)
class View:
    sae: str
    text: str = ""
    """Part of the top token's text."""
    log_density: Range | None = None
    """Bounds on log10 of the density; a lower one leaves out dead features."""
    max_act: Range | None = None
    dead: Shown = "any"
    dense: Shown = "any"
    among: tuple[int, ...] = ()
    """Only these features."""
    sort: str = "feature"
    descending: bool = False
    page: int = 1
    group: str = "top"
    window: int = 16

    @classmethod
    def from_query(cls, params: Mapping[str, str], *, sae: str, columns: Sequence[str]) -> View:
        """Read a view of ``sae``; a value that cannot be meant is left at its default.

        ``columns`` are those that the features can be sorted by.
        """
        sort = params.get("sort", "feature")
        return cls(
            sae=sae,
            text=params.get("q", ""),
            log_density=_range(params.get("density")),
            max_act=_range(params.get("max")),
            dead=_one_of(SHOWN, params.get("dead")),
            dense=_one_of(SHOWN, params.get("dense")),
            among=_features(params.get("among")),
            sort=sort if sort in columns else "feature",
            descending=params.get("desc") == "1",
            page=max(whole(params.get("page")) or 1, 1),
            group=params.get("group", "top"),
            window=_one_of((16, *WINDOWS), whole(params.get("window"))),
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
        return not any(self.filters().values())

    def sorted_by(self, column: str) -> View:
        """The view after a click on a column's heading: big values first, then small ones."""
        descending = not self.descending if column == self.sort else column != "feature"
        return replace(self, sort=column, descending=descending, page=1)

    def filters(self) -> dict[str, Any]:
        """The listed features, in the words of ``FeatureStore.features``."""
        ranges: dict[str, Range] = {}
        if self.log_density is not None:
            low, high = self.log_density
            ranges["density"] = (None if low is None else 10**low, None if high is None else 10**high)
        if self.max_act is not None:
            ranges["max_act"] = self.max_act
        chosen = {"dead": self.dead, "dense": self.dense}
        flags = {name: shown == "only" for name, shown in chosen.items() if shown != "any"}
        return {
            "ranges": ranges or None, "flags": flags or None, "text": self.text or None,
            "among": self.among or None,
        }  # fmt: skip

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


def _features(value: str | None) -> tuple[int, ...]:
    """Numbers of features from a URL: 3,17,40."""
    numbers = [whole(part) for part in (value or "").split(",")]
    return tuple(dict.fromkeys(number for number in numbers if number is not None))[:MOST_AMONG]


def _written(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    if name == "among":
        return ",".join(map(str, value))
    if isinstance(value, tuple):
        return "..".join("" if bound is None else f"{bound:g}" for bound in value)
    return str(value)
