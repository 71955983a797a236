"""The script that Streamlit runs for every view of every page: the frame of the page, and the page."""

from __future__ import annotations

from functools import partial
from types import ModuleType

import streamlit as st
from streamlit.navigation.page import Page

from saebench.core.errors import UserError
from saebench.core.refusals import system_refusals
from saebench_app.components.notice import notice
from saebench_app.components.sidebar import sidebar
from saebench_app.components.web import STATIC
from saebench_app.page import (
    compare,
    context,
    explain,
    feature,
    features,
    lists,
    map,
    overview,
    prompt,
    sql,
    steer,
    token,
    train,
)
from saebench_app.page.features.columns import SORTABLE
from saebench_app.session import SAID, Here, open_session_store, url_parameters
from saebench_app.view import View

MODULES = (
    overview,
    features,
    feature,
    prompt,
    token,
    context,
    compare,
    map,
    steer,
    explain,
    train,
    lists,
    sql,
)


def main() -> None:
    st.set_page_config(page_title="saebench", layout="wide")
    st.html(STATIC / "frame.css")
    pages: dict[str, Page] = {}
    for module in MODULES:
        pages[module.PATH] = st.Page(
            partial(show, module, pages), title=module.TITLE, url_path=module.PATH, default=module is overview
        )
    st.navigation(list(pages.values()), position="hidden").run()


def sections() -> dict[str, list[str]]:
    """Section of the sidebar -> the paths of its pages, in order."""
    found: dict[str, list[str]] = {}
    for module in MODULES:
        found.setdefault(module.SECTION, []).append(module.PATH)
    return found


def show(module: ModuleType, pages: dict[str, Page]) -> None:
    """One page inside its frame. A UserError, or what the system refuses, is shown as a sentence."""
    try:
        with system_refusals():
            store = open_session_store(st.query_params.get("sae"))
            view = View.from_query(url_parameters(), sae=store.sae, columns=SORTABLE)
            here = Here(store, view, pages)
            sidebar(here, sections(), module.PATH)
            if said := st.session_state.pop(SAID, None):
                notice(said, key="said", kind="error")
            module.show(here)
    except UserError as error:
        notice(str(error), key="error", kind="error")


main()
