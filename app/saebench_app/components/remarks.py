"""Comments: who said what, and when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from saebench.core.formatting import visible
from saebench_app.components.web import show


def remarks(comments: Sequence[Mapping[str, Any]], *, key: str) -> None:
    """``comments`` have comment, author and time."""
    shown = [
        {
            "text": "\n".join(visible(line) for line in one["comment"].splitlines()),
            "author": visible(one["author"]) if one["author"] else "somebody",
            "time": f"{one['time'][:10]} {one['time'][11:16]} UTC",
        }
        for one in comments
    ]
    show("remarks", {"remarks": shown}, key=key)
