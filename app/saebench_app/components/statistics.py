"""Statistics as a row of tiles: a name, a number, and a line that explains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from saebench_app.components.web import show


@dataclass(frozen=True)
class Statistic:
    """``value`` is shown; ``exact`` is the number it was written from, in the tooltip with ``help``."""

    name: str
    value: str
    note: str = ""
    exact: float | int | None = None
    help: str = ""


def statistics(tiles: Sequence[Statistic], *, key: str, small: bool = False) -> None:
    show("statistics", {"tiles": [asdict(tile) for tile in tiles], "small": small}, key=key)
