"""A whole text whose tokens can be selected, colored by up to four features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from saebench.core.formatting import number, visible
from saebench_app.components.web import show

LANES = 4
"""Features that can be told apart on one text."""


@dataclass(frozen=True)
class Lane:
    """One feature on the text: ``acts`` has a value for each token, ``scale`` is that of the full color."""

    acts: Sequence[float]
    scale: float
    name: str
    href: str = ""
    note: str = ""
    links: Sequence[tuple[str, str, str]] = field(default_factory=tuple)
    """Text, address and name for screen readers of further links in the legend."""


def passage(
    pieces: Sequence[str],
    lanes: Sequence[Lane] = (),
    *,
    name: str,
    key: str,
    link: str = "",
    current: int | None = None,
    quiet: int = 0,
    tall: bool = False,
) -> None:
    """``name`` is what screen readers call it. With ``link``, a URL to which a token's number is
    appended, tokens can be selected; ``current`` is the selected one. The first ``quiet`` tokens are pale. A
    ``tall`` one scrolls."""
    spans = [
        [visible(piece), [_level(lane, at) for lane in lanes], _title(lanes, at), at < quiet]
        for at, piece in enumerate(pieces)
    ]
    legend = [
        {
            **{k: v for k, v in asdict(lane).items() if k not in ("acts", "scale")},
            "scale": f"0 to {number(lane.scale)}" if lane.scale > 0 else "never fires",
        }
        for lane in lanes
    ]
    data = {
        "name": name,
        "spans": spans,
        "legend": legend,
        "lanes": len(lanes),
        "link": link,
        "current": -1 if current is None else current,
        "tall": tall,
    }
    show("passage", data, key=key)


def _level(lane: Lane, at: int) -> float:
    return round(min(abs(lane.acts[at]) / lane.scale, 1), 3) if lane.scale > 0 else 0


def _title(lanes: Sequence[Lane], at: int) -> str:
    fires = [lane for lane in lanes if lane.acts[at]]
    if len(lanes) == 1:
        return number(fires[0].acts[at]) if fires else ""
    return ", ".join(f"{lane.name}: {number(lane.acts[at])}" for lane in fires)
