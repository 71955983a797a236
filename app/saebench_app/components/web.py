"""Custom elements of the page: a script and a style sheet of ours, given data as JSON.

Their scripts put every text into the page as a text node and never parse markup, so nothing that a store
contains can become an element or a script. Links are real ones (``href``); a plain click on them changes the
address without loading the app again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import streamlit as st

STATIC = Path(__file__).parent.parent / "static"


def show(name: str, data: dict[str, Any], *, key: str, **events: Callable[[], None]) -> None:
    """Put the element ``static/NAME.js`` with ``data`` on the page; ``on_NAME_change`` are its callbacks."""
    _element(name)(data=data, key=key, **events)


@cache
def _element(name: str) -> Any:
    script = (STATIC / "dom.js").read_text("utf-8") + (STATIC / f"{name}.js").read_text("utf-8")
    style = (STATIC / "base.css").read_text("utf-8") + (STATIC / f"{name}.css").read_text("utf-8")
    return st.components.v2.component(f"saebench_{name}", js=script, css=style)
