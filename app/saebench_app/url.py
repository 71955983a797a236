"""What pages read from their URL and write into it: parameters are declared once, as fields of a `Query`.

A page that has parameters of its own derives a frozen dataclass from `Query` and gives each field a
`parameter`: its default and a codec, which says what values it can have. A value that a codec cannot read is
left at its default, so that any URL shows a page; a value that is the default is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, Protocol, Self, TypeAlias

Range: TypeAlias = tuple[float | None, float | None]
"""Lowest and highest, both included; None leaves that side open."""
Written: TypeAlias = dict[str, str | list[str]]
"""Parameters of a URL; one that is given several times has a list."""
Allowed: TypeAlias = Sequence[Any]


class Codec(Protocol):
    """How a value is read from the text of a parameter and written into it."""

    def read(self, text: str, allowed: Allowed | None) -> Any:
        """The value; ``allowed`` are the values of a store or page that are only known when it is read.

        Raises:
            ValueError: ``text`` cannot be meant.
        """

    def write(self, value: Any) -> str: ...


@dataclass(frozen=True)
class Text:
    """Any text; what is longer than ``longest`` characters is cut."""

    longest: int | None = None

    def read(self, text: str, allowed: Allowed | None) -> str:
        return text[: self.longest]

    def write(self, value: str) -> str:
        return value


@dataclass(frozen=True)
class Flag:
    """Whether something is on: 1 or 0."""

    def read(self, text: str, allowed: Allowed | None) -> bool:
        return text == "1"

    def write(self, value: bool) -> str:
        return "1" if value else "0"


@dataclass(frozen=True)
class Whole:
    """A whole number of at most 11 digits, moved to the nearest one from ``low`` to ``high``."""

    low: int = 0
    high: int | None = None

    def read(self, text: str, allowed: Allowed | None = None) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 12):
            raise ValueError(text)
        value = max(int(text), self.low)
        return value if self.high is None else min(value, self.high)

    def write(self, value: int) -> str:
        return str(value)


@dataclass(frozen=True)
class Decimal:
    """A finite number, moved to the nearest one from ``low`` to ``high``; written with six digits."""

    low: float
    high: float

    def read(self, text: str, allowed: Allowed | None) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(text)
        return min(max(value, self.low), self.high) + 0.0

    def write(self, value: float) -> str:
        return f"{value:g}"


@dataclass(frozen=True)
class Choice:
    """One of ``values``, or of those that are allowed when it is read."""

    values: Sequence[str] | Sequence[int] = ()

    def read(self, text: str, allowed: Allowed | None) -> str | int:
        for value in self.values if allowed is None else allowed:
            if str(value) == text:
                found: str | int = value
                return found
        raise ValueError(text)

    def write(self, value: str | int) -> str:
        return str(value)


@dataclass(frozen=True)
class Bounds:
    """A `Range`, as 0.1..2, 0.1.. or ..2."""

    def read(self, text: str, allowed: Allowed | None) -> Range:
        low, dots, high = text.partition("..")
        bounds = float(low) if low else None, float(high) if high else None
        given = [bound for bound in bounds if bound is not None]
        if not dots or not given or not all(map(math.isfinite, given)) or given != sorted(given):
            raise ValueError(text)
        return bounds

    def write(self, value: Range) -> str:
        return "..".join("" if bound is None else f"{bound:g}" for bound in value)


@dataclass(frozen=True)
class Wholes:
    """At most ``most`` different whole numbers with commas between them: 3,17,40."""

    most: int

    def read(self, text: str, allowed: Allowed | None) -> tuple[int, ...]:
        found = []
        for part in text.split(","):
            try:
                found.append(Whole().read(part.strip()))
            except ValueError:
                continue
        return tuple(dict.fromkeys(found))[: self.most]

    def write(self, value: tuple[int, ...]) -> str:
        return ",".join(map(str, value))


@dataclass(frozen=True)
class Names:
    """Different names with commas between them; with ``values``, or allowed ones, only those."""

    values: Sequence[str] | None = None

    def read(self, text: str, allowed: Allowed | None) -> tuple[str, ...]:
        known = self.values if allowed is None else allowed
        found = dict.fromkeys(name for name in text.split(",") if name)
        return tuple(name for name in found if known is None or name in known)

    def write(self, value: tuple[str, ...]) -> str:
        return ",".join(value)


@dataclass(frozen=True)
class Texts:
    """Texts, each in a parameter of its own: they may contain commas."""


def parameter(default: Any, codec: Codec | Texts, *, name: str = "", old: Sequence[str] = ()) -> Any:
    """A field of a `Query`.

    Args:
        default: the value where the URL has none that can be read; MISSING when it depends on the store.
        name: what it is called in the URL, where that is not the name of the field.
        old: names that earlier versions wrote; they are read, not written.
    """
    return field(default=default, metadata={"codec": codec, "name": name, "old": tuple(old)})


@dataclass(frozen=True, kw_only=True)
class Query:
    """Parameters of a URL; see the module."""

    @classmethod
    def read(
        cls,
        params: Mapping[str, str | Sequence[str]],
        *,
        allowed: Mapping[str, Allowed] | None = None,
        **given: Any,
    ) -> Self:
        """What a URL asks for.

        Args:
            params: the parameters of the URL.
            allowed: field -> the values that it can have, where they are only known now.
            given: values of fields, whatever the URL says.
        """
        values = dict(given)
        for one in fields(cls):
            text = next((params[name] for name in _names(one) if name in params), None)
            if text is None or one.name in given:
                continue
            codec = one.metadata["codec"]
            texts = [text] if isinstance(text, str) else list(text)
            if isinstance(codec, Texts):
                values[one.name] = tuple(filter(None, texts))
                continue
            try:
                values[one.name] = codec.read(texts[-1] if texts else "", (allowed or {}).get(one.name))
            except ValueError:
                continue
        return cls(**values)

    def query(self) -> Written:
        """What ``read`` reads back."""
        written: Written = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if value == one.default:
                continue
            codec = one.metadata["codec"]
            written[_names(one)[0]] = list(value) if isinstance(codec, Texts) else codec.write(value)
        return written


def parameters(query: type[Query]) -> dict[str, tuple[str, ...]]:
    """Name of each parameter in the URL -> names under which earlier versions wrote it."""
    return {(names := _names(one))[0]: names[1:] for one in fields(query)}


def _names(one: Field[Any]) -> tuple[str, ...]:
    return (one.metadata["name"] or one.name, *one.metadata["old"])
