"""The comments on a feature, with author and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from saebench.core.formatting import visible
from saebench_app.components.web import show


def comments(said: Sequence[Mapping[str, Any]], *, key: str) -> None:
    """``said`` have comment, author and time."""
    shown = [
        {
            "text": "\n".join(visible(line) for line in one["comment"].splitlines()),
            "author": visible(one["author"]) if one["author"] else "anonymous",
            "time": f"{one['time'][:10]} {one['time'][11:16]} UTC",
        }
        for one in said
    ]
    show("comments", {"comments": shown}, key=key)
