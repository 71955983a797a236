"""The store that a person is looking at: opened once a generation, shared by all sessions."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import streamlit as st
from streamlit.navigation.page import Page

from saebench.store.publish import read_manifest
from saebench.store.query import FeatureStore, open_store
from saebench_app.view import View, whole


def store_path() -> Path:
    """The store named on the command line; no URL can name another one."""
    return Path(sys.argv[1])


def open_session_store(sae: str | None) -> FeatureStore:
    """The store of this session, in the generation that the session began with or moved to.

    Raises:
        UserError: the store has gone, is damaged, or has no SAE of that name.
    """
    path = store_path()
    if "generation" not in st.session_state:
        move_to_newest()
    return _open(str(path), st.session_state["generation"], sae)


def move_to_newest() -> None:
    st.session_state["generation"] = read_manifest(store_path()).generation


@st.cache_resource(max_entries=16, on_release=FeatureStore.close, show_spinner=False)
def _open(path: str, generation: int, sae: str | None) -> FeatureStore:
    """``generation`` is the key under which the opened store is kept: the newest one when it was opened."""
    return open_store(path, sae)


@dataclass(frozen=True)
class Here:
    """What every page is given: the open store, what the URL asks for, and the way to the other pages."""

    store: FeatureStore
    view: View
    pages: Mapping[str, Page]

    def feature(self) -> int | None:
        """The feature that the URL asks for."""
        return whole(st.query_params.get("f"))

    def show(self, view: View, **more: int | str) -> None:
        """Move to another view of this page; Back returns. For use in the callback of a widget."""
        query = view.query(**more)
        if query != st.query_params.to_dict():
            st.query_params.from_dict(query)


atexit.register(_open.clear)
