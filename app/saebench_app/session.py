"""The store that a session shows: opened once per generation and shared by all sessions."""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import streamlit as st
from streamlit.navigation.page import Page

from saebench.core.errors import UserError
from saebench.core.refusals import system_refusals
from saebench.store.annotations import Annotations
from saebench.store.publish import read_manifest
from saebench.store.query import FeatureStore, open_store
from saebench_app.access import read_only
from saebench_app.url import Query
from saebench_app.view import Focus, View

Q = TypeVar("Q", bound=Query)

AUTHOR = "author"
"""Session key of the name that goes with what the person writes."""
SAID = "said"
"""Session key of a sentence that the next page begins with."""


def store_path() -> Path:
    """The store named on the command line; no URL can name another one."""
    return Path(sys.argv[1])


def url_parameters() -> dict[str, list[str]]:
    """The parameters of the URL; one that is given several times has several texts."""
    return {name: st.query_params.get_all(name) for name in st.query_params}


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
    """Show the newest generation from now on.

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
    """What every page is given: the open store, the view that the URL asks for, and the other pages."""

    store: FeatureStore
    view: View
    pages: Mapping[str, Page]

    @functools.cached_property
    def annotations(self) -> Annotations:
        """The annotations of the SAE's features; new ones get the author of this session."""
        info, author = self.store.info(), st.session_state.get(AUTHOR, "")
        return Annotations(
            self.store.path, info["sae_hash"], d_sae=info["d_sae"], author=author, read_only=read_only()
        )

    @functools.cached_property
    def names(self) -> dict[int, str]:
        """Feature -> label."""
        labels = self.annotations.labels()
        return dict(zip(labels["feature"].tolist(), labels["label"].tolist(), strict=True))

    @functools.cached_property
    def bookmarks(self) -> set[int]:
        return set(self.annotations.bookmarks()["feature"].tolist())

    def filters(self) -> dict[str, Any]:
        """The listed features, as arguments of ``FeatureStore.features``."""
        view, chosen = self.view, self.view.filters()
        kept = [set(view.among)] if view.among else []
        kept += [self.bookmarks] if view.bookmarked else []
        kept += [set(self.names)] if view.labeled else []
        kept += [set(self.annotations.list_features(view.list))] if view.list else []
        if kept:
            chosen["among"] = sorted(set.intersection(*kept))
        return chosen | ({"labels": self.names} if view.text else {})

    def read(self, query: type[Q], *, allowed: Mapping[str, Sequence[Any]] | None = None, **given: Any) -> Q:
        """The parameters of a page, as the URL has them; see `Query.read`."""
        return query.read(url_parameters(), allowed=allowed, **given)

    def feature(self) -> int | None:
        """The feature that the URL asks for."""
        return self.read(Focus).f

    def show(self, view: View, *own: Query, **more: int | str) -> None:
        """Move to another view of this page; Back returns. For use in the callback of a widget."""
        query = view.query(*own, **more)
        if query != st.query_params.to_dict():
            st.query_params.from_dict(query)


def attempt(do: Callable[[], object], then: Callable[[], object] | None = None) -> None:
    """Call ``do``, then ``then``, in the callback of a widget; the next page shows what is wrong with it."""
    try:
        with system_refusals():
            do()
    except UserError as error:
        st.session_state[SAID] = str(error)
    else:
        if then is not None:
            then()


atexit.register(_open.clear)
