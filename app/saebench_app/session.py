"""The store that a person is looking at: opened once a generation, shared by all sessions."""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st
from streamlit.navigation.page import Page

from saebench.core.errors import UserError
from saebench.store.annotations import Annotations
from saebench.store.publish import read_manifest
from saebench.store.query import FeatureStore, open_store
from saebench_app.view import View, whole

AUTHOR = "author"
"""Key of the session under which the name of the person is kept."""
SAID = "said"
"""Key of the session for a sentence that the next page begins with."""


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
    made, first = st.session_state.get("made", ""), st.session_state.get("first")
    return _open(str(path), st.session_state["generation"], made, first if sae is None else sae)


def move_to_newest() -> None:
    """Look at the newest generation from now on.

    A store that was removed and made anew counts from 1 again, under names of files that are still open:
    DuckDB would show the old ones, so they are closed first.
    """
    manifest = read_manifest(store_path())
    if manifest.generation <= st.session_state.get("generation", 0):
        _open.clear()
    made = hashlib.sha256(json.dumps(manifest.to_json(), sort_keys=True).encode()).hexdigest()
    first = manifest.saes[0].name if manifest.saes else None
    st.session_state.update({"generation": manifest.generation, "made": made, "first": first})


@st.cache_resource(max_entries=16, on_release=FeatureStore.close, show_spinner=False)
def _open(path: str, generation: int, made: str, sae: str | None) -> FeatureStore:
    """``generation`` and ``made``, the hash of its manifest, are the key under which the opened store
    is kept; it is the newest one when it was opened."""
    return open_store(path, sae)


@dataclass(frozen=True)
class Here:
    """What every page is given: the open store, what the URL asks for, and the way to the other pages."""

    store: FeatureStore
    view: View
    pages: Mapping[str, Page]

    @functools.cached_property
    def annotations(self) -> Annotations:
        """What people said of the SAE's features; what is written goes under this session's author."""
        notes = self.store.annotations
        notes.author = st.session_state.get(AUTHOR, "")
        return notes

    @functools.cached_property
    def names(self) -> dict[int, str]:
        """Feature -> label."""
        labels = self.annotations.labels()
        return dict(zip(labels["feature"].tolist(), labels["label"].tolist(), strict=True))

    @functools.cached_property
    def bookmarks(self) -> set[int]:
        return set(self.annotations.bookmarks()["feature"].tolist())

    def filters(self) -> dict[str, Any]:
        """The listed features, in the words of ``FeatureStore.features``."""
        view, chosen = self.view, self.view.filters()
        kept = [set(view.among)] if view.among else []
        kept += [self.bookmarks] if view.bookmarked else []
        kept += [set(self.names)] if view.labeled else []
        kept += [set(self.annotations.list_features(view.list))] if view.list else []
        if kept:
            chosen["among"] = sorted(set.intersection(*kept))
        return chosen | ({"labels": self.names} if view.text else {})

    def feature(self) -> int | None:
        """The feature that the URL asks for."""
        return whole(st.query_params.get("f"))

    def show(self, view: View, **more: int | str) -> None:
        """Move to another view of this page; Back returns. For use in the callback of a widget."""
        query = view.query(**more)
        if query != st.query_params.to_dict():
            st.query_params.from_dict(query)


def attempt(do: Callable[[], object], then: Callable[[], object] | None = None) -> None:
    """Do what the callback of a widget asks for, then ``then``; what is wrong with it is said on the page
    that follows."""
    try:
        do()
    except UserError as error:
        st.session_state[SAID] = str(error)
    else:
        if then is not None:
            then()


atexit.register(_open.clear)
