"""What Streamlit runs for every view of every page: the frame around it and the way to it."""

from __future__ import annotations

from functools import partial
from types import ModuleType

import streamlit as st
from streamlit.navigation.page import Page

from saebench.errors import UserError
from saebench_app.components.notice import notice
from saebench_app.components.sidebar import sidebar
from saebench_app.components.web import STATIC
from saebench_app.page import compare, explain, feature, features, map, overview, sql, train
from saebench_app.session import Here, open_session_store
from saebench_app.view import View

MODULES = (overview, features, feature, compare, map, explain, train, sql)


def main() -> None:
    st.set_page_config(page_title="saebench", layout="wide")
    st.html(STATIC / "frame.css")
    pages: dict[str, Page] = {}
    for module in MODULES:
        pages[module.PATH] = st.Page(
            partial(show, module, pages), title=module.TITLE, url_path=module.PATH, default=module is overview
        )
    st.navigation(list(pages.values()), position="hidden").run()


def show(module: ModuleType, pages: dict[str, Page]) -> None:
    """One page inside its frame. What a person can put right is said in a sentence."""
    try:
        store = open_session_store(st.query_params.get("sae"))
        view = View.from_query(st.query_params.to_dict(), sae=store.sae, columns=features.SORTABLE)
        here = Here(store, view, pages)
        sidebar(here)
        module.show(here)
    except UserError as error:
        notice(str(error), key="error", kind="error")


main()
