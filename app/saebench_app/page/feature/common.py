"""What the parts of the Feature page share."""

from __future__ import annotations

from typing import Any

from saebench_app.components.head import Choice, Head, Option
from saebench_app.session import Here
from saebench_app.view import View

PATH = "feature"


def fold(view: View, feature: int, part: str, title: str) -> Head:
    """A heading whose part is shown once it is opened."""
    href = view.toggled(part).url(PATH, f=feature)
    option = Option("hide" if part in view.open else "show", href, part in view.open)
    return Head(title, choices=(Choice(title, (option,)),))


def why_missing(here: Here, table_name: str) -> str:
    """Why the store lacks a table, in a sentence."""
    reason = here.store.why_missing(table_name)
    return f"{reason[:1].upper()}{reason[1:].rstrip('.')}."


def exact(value: Any) -> float | None:
    """``value`` as a number, or None where the store has none."""
    return None if value is None or value != value else float(value)
