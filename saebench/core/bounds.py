"""Bounds of numbers, declared on the fields of settings: ``k: Annotated[int, AtLeast(1)] = 32``."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from saebench.core.errors import UserError


@dataclass(frozen=True)
class Bound:
    """A limit of a number. A bounded number is also finite, and not NaN."""

    number: float
    words: ClassVar[str]

    def holds(self, value: float) -> bool:
        raise NotImplementedError

    def __str__(self) -> str:
        return f"{self.words} {'2**63' if self.number == 2**63 else self.number}"


class AtLeast(Bound):
    words = "at least"

    def holds(self, value: float) -> bool:
        return value >= self.number


class Above(Bound):
    words = "above"

    def holds(self, value: float) -> bool:
        return value > self.number


class AtMost(Bound):
    words = "at most"

    def holds(self, value: float) -> bool:
        return value <= self.number


class Below(Bound):
    words = "below"

    def holds(self, value: float) -> bool:
        return value < self.number


Seed = Annotated[int, AtLeast(0), Below(2**63)]
"""A seed fits the 64 bits that random generators take."""


def check_bounds(config: object) -> None:
    """Raise a UserError for the first field of the dataclass ``config`` whose value violates its bounds.

    None passes, and so do the words of a type like ``float | Literal["auto"]``.
    """
    for name, (bounds, allowed) in _bounds(type(config)).items():  # type: ignore[arg-type]
        value = getattr(config, name)
        if value is None or value in allowed:
            continue
        for bound in bounds:
            if isinstance(value, str) or not bound.holds(value):
                instead = "".join(f"{word!r} or " for word in allowed)
                raise UserError(f"{name} is {value}; it must be {instead}{bound}")
        if value == math.inf:
            raise UserError(f"{name} is infinite; give a finite number")


@functools.cache
def _bounds(config_class: type[object]) -> dict[str, tuple[tuple[Bound, ...], tuple[str, ...]]]:
    """Field -> its bounds, and the words that it may have instead of a number."""
    found = {}
    for name, kind in get_type_hints(config_class, include_extras=True).items():
        bounds = tuple(part for part in _parts(kind) if isinstance(part, Bound))
        if bounds:
            found[name] = bounds, tuple(part for part in _parts(kind) if isinstance(part, str))
    return found


def _parts(kind: Any) -> list[Any]:
    """What a type is made of: the metadata of Annotated, the values of Literal, the members of a union."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [kind, *(part for inner in get_args(kind) for part in _parts(inner))]
