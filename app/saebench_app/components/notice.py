"""A sentence to the reader: what is wrong or missing, and what to do."""

from __future__ import annotations

from typing import Literal

from saebench_app.components.web import show


def notice(text: str, *, key: str, kind: Literal["info", "error"] = "info") -> None:
    show("notice", {"text": text, "kind": kind}, key=key)
