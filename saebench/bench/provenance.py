"""The date and the commit of a measurement."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path


def now() -> str:
    """The current time in UTC, such as '2026-11-27T20:10:55+00:00'."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def commit(root: Path | None = None) -> str | None:
    """The commit of the checkout, with '-dirty' if it has changes; None outside a checkout."""
    root = Path(__file__).resolve().parents[2] if root is None else root
    if not (root / ".git").exists():
        return None
    words = ["git", "-C", str(root), "describe", "--always", "--abbrev=10", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
