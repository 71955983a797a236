"""What pages with a text or place of their own ask for in their URL, beside what `View` says.

The names of their parameters are none of those that a view has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from saebench_app.components.passage import LANES
from saebench_app.described import Described
from saebench_app.view import whole

MEASURES = ("max", "sum", "at", "attribution")
"""What features on a text can be sorted by."""
WAYS = ("add", "clamp", "scale", "ablate")
"""How features can be changed."""
SWEEP = (0.5, 1.0, 2.0, 4.0)
"""Strengths that are proposed: times the feature's largest activation; when scaling, as they are."""
LONGEST = 4000
"""Characters of a text: an address has to hold it."""
MOST_PINS, MOST_STRENGTHS, MOST_FEATURES, MOST_TOKENS = 24, 12, 8, 100


class Query:
    """A frozen dataclass whose fields are called as in the URL."""

    def query(self) -> dict[str, str]:
        """What ``from_query`` reads back; defaults are left out."""
        given = [(one.name, getattr(self, one.name), one.default) for one in fields(self)]  # type: ignore[arg-type]
        return {name: written(value) for name, value, default in given if value != default}


@dataclass(frozen=True, kw_only=True)
class Prompt(Query):
    """Of the Prompt page."""

    text: str = ""
    text2: str = ""
    by: str = "max"
    at: int | None = None
    """Position of the chosen token; None for the last."""
    cut: float = 0.0
    """Features denser than 10**cut are left out."""
    bos: bool = False
    """Whether position 0 counts, which most models make out of proportion."""
    target: str = ""
    pin: tuple[int, ...] = ()
    f: int | None = None

    @classmethod
    def from_query(cls, params: Mapping[str, str]) -> Prompt:
        pins = (whole(part) for part in params.get("pin", "").split(",")[:MOST_PINS])
        return cls(
            text=params.get("text", "")[:LONGEST],
            text2=params.get("text2", "")[:LONGEST],
            by=params["by"] if params.get("by") in MEASURES else "max",
            at=whole(params.get("at")),
            cut=decimal(params.get("cut"), -99.0, 0.0),
            bos=params.get("bos") == "1",
            target=params.get("target", ""),
            pin=tuple(dict.fromkeys(pin for pin in pins if pin is not None)),
            f=whole(params.get("f")),
        )


@dataclass(frozen=True, kw_only=True)
class Steer(Query):
    """Of the Steer page."""

    text: str = ""
    f: tuple[int, ...] = ()
    how: str = "add"
    strength: str = ""
    """Numbers with commas; empty: those that are proposed."""
    new: int = 20
    temp: float = 0.0
    seed: int = 0
    s: int | None = None
    """Which of the strengths is shown; None for one in the middle."""

    @classmethod
    def from_query(cls, params: Mapping[str, str]) -> Steer:
        given = (whole(part.strip()) for part in params.get("f", "").split(","))
        new = whole(params.get("new"))
        return cls(
            text=params.get("text", "")[:LONGEST],
            f=tuple(dict.fromkeys(f for f in given if f is not None))[:MOST_FEATURES],
            how=params["how"] if params.get("how") in WAYS else "add",
            strength=params.get("strength", "")[:200],
            new=20 if new is None else min(new, MOST_TOKENS),
            temp=decimal(params.get("temp"), 0.0, 2.0),
            seed=whole(params.get("seed")) or 0,
            s=whole(params.get("s")),
        )

    def strengths(self, known: Mapping[int, Described]) -> list[float] | None:
        """The numbers that are tried, or None when they are no numbers."""
        if self.how == "ablate":
            return [0.0]
        if self.strength.strip():
            try:
                values = [float(part) for part in self.strength.replace(";", ",").split(",") if part.strip()]
            except ValueError:
                return None
            fine = 0 < len(values) <= MOST_STRENGTHS and all(map(math.isfinite, values))
            return list(dict.fromkeys(values)) if fine else None
        unit = 1.0 if self.how == "scale" else max((known[f].max_act for f in self.f), default=1.0) or 1.0
        return [float(f"{times * unit:.2g}") for times in SWEEP]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Of the Context page."""

    c: int = 0
    pos: int | None = None
    features: tuple[int, ...] = ()

    @classmethod
    def from_query(cls, params: Mapping[str, str]) -> Place:
        given = (whole(params.get(f"f{lane}")) for lane in range(1, LANES + 1))
        features = tuple(dict.fromkeys(feature for feature in given if feature is not None))
        return cls(c=whole(params.get("c")) or 0, pos=whole(params.get("pos")), features=features)

    def query(self) -> dict[str, int]:
        """What ``from_query`` reads back."""
        chosen = {} if self.pos is None else {"pos": self.pos}
        return {"c": self.c} | chosen | {f"f{lane}": f for lane, f in enumerate(self.features, 1)}

    def without(self, feature: int) -> Place:
        return replace(self, features=tuple(one for one in self.features if one != feature))

    def with_(self, feature: int) -> Place:
        """The feature laid over the text as well, in place of the last one when there are four."""
        kept = self.without(feature).features[: LANES - 1]
        return replace(self, features=(*kept, feature))


def decimal(value: str | None, low: float, high: float) -> float:
    """A number from a URL between ``low`` and ``high``; 0 for what is none."""
    try:
        found = float(value or 0)
    except ValueError:
        return 0.0
    return min(max(found, low), high) + 0.0 if math.isfinite(found) else 0.0


def written(value: Any) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
