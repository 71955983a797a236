"""The parameters of the Prompt page."""

from __future__ import annotations

from dataclasses import dataclass

from saebench_app.answers import LONGEST_TEXT
from saebench_app.session import Here
from saebench_app.url import Choice, Decimal, Flag, Query, Text, Whole, Wholes, parameter

MEASURES = {
    "max": ("max", "max activation on the text"),
    "sum": ("sum", "sum of the activations over the text"),
    "at": ("at token", "activation on the selected token"),
    "attribution": ("attribution", "effect on the logit of the target token, to first order"),
}
"""What features on a text can be sorted by -> its label and help text."""
MOST_PINS = 24


@dataclass(frozen=True, kw_only=True)
class Prompt(Query):
    text: str = parameter("", Text(LONGEST_TEXT))
    text2: str = parameter("", Text(LONGEST_TEXT))
    by: str = parameter("max", Choice(tuple(MEASURES)))
    at: int | None = parameter(None, Whole())
    """Position of the selected token; None for the last."""
    cut: float = parameter(0.0, Decimal(-99.0, 0.0))
    """Features with a density above 10**cut are left out."""
    bos: bool = parameter(False, Flag())
    """Whether position 0 counts; most models give it activations that are far too large."""
    target: str = parameter("", Text())
    pin: tuple[int, ...] = parameter((), Wholes(MOST_PINS))
    f: int | None = parameter(None, Whole())

    def pinned(self, here: Here) -> list[int]:
        """The features that are shown first: the one of the URL, then those that are pinned."""
        d_sae = here.store.info()["d_sae"]
        wanted = self.pin if self.f is None else (self.f, *self.pin)
        return list(dict.fromkeys(one for one in wanted if one < d_sae))
