"""The head of a part of a page: its title, and links to its other states, so that each state is a URL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from saebench_app.components.web import show


@dataclass(frozen=True)
class Option:
    label: str
    href: str
    current: bool = False
    help: str = ""


@dataclass(frozen=True)
class Choice:
    """``label`` is what screen readers call the options."""

    label: str
    options: Sequence[Option]


@dataclass(frozen=True)
class Head:
    title: str
    help: str = ""
    choices: Sequence[Choice] = ()


def plain(head: Head | None) -> dict[str, Any] | None:
    """As JSON for the scripts."""
    return None if head is None else asdict(head)


def heading(head: Head, *, key: str) -> None:
    """A head by itself, above something that is not one of our elements."""
    show("heading", {"head": plain(head)}, key=key)
