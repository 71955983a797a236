"""``--read-only``: no page and no function behind one changes the store, starts a job, or answers SQL."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from saebench.core.errors import UserError
from saebench.store.query import open_store
from saebench_app.access import READ_ONLY
from saebench_app.page import sql
from saebench_app.session import Here
from saebench_app.view import View
from saebench_app.work import Task, _works, start
from tests.app.conftest import shown
from tests.store.rich_store import HOSTILE

Visit = Callable[..., AppTest]

PAGES: list[tuple[str, dict[str, Any]]] = [
    ("store", {}),
    ("features", {}),
    ("feature", {"f": 3, "open": "explanations"}),
    ("compare", {}),
    ("map", {}),
    ("explain", {}),
    ("train", {}),
    *(("lists", {"part": part}) for part in ("lists", "bookmarks", "labels", "comments", "files")),
    ("lists", {"list": HOSTILE}),
    ("sql", {"query": "SELECT 1"}),
]
EDITS = {"bookmark", "label", "on-lists", "comment", "new-name", "view-name", "import", "list-name", "query"}
"""Keys of the widgets that write annotations or SQL."""


@pytest.fixture(autouse=True)
def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(READ_ONLY, "1")


@pytest.fixture
def own_store(rich_store: Path, tmp_path: Path) -> Path:
    shutil.copytree(rich_store, tmp_path / "store")
    return tmp_path / "store"


def digests(folder: Path) -> dict[str, str]:
    """Of every file that is more than SQLite's own index of its log."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".sqlite-shm",)]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.stat().st_size}


@pytest.mark.parametrize(("page", "query"), PAGES)
def test_no_button_of_a_page_changes_the_store_or_starts_a_job(
    visit: Visit, own_store: Path, own_cache: Path, page: str, query: dict[str, Any]
) -> None:
    before, jobs = digests(own_store), set(_works())
    app = visit(own_store, page, **query)
    kinds = ("button", "text_input", "text_area", "multiselect", "selectbox", "file_uploader")
    there = {getattr(one, "key", None) for kind in kinds for one in app.get(kind)}
    assert not there & EDITS
    assert not any(str(key).startswith("start-") for key in there)
    for number in range(len(app.button)):
        again = visit(own_store, page, **query)
        if number < len(again.button) and not again.button[number].disabled:
            again.button[number].click().run()
            assert not again.exception
    assert digests(own_store) == before
    assert set(_works()) == jobs


def test_sql_says_why_it_is_off(visit: Visit, own_store: Path) -> None:
    said = shown(visit(own_store, "sql", query="SELECT 1"), "error")
    assert said is not None
    assert "--read-only" in said["text"]


def test_labels_and_comments_are_still_shown(visit: Visit, own_store: Path) -> None:
    lead = shown(visit(own_store, "feature", f=3), "lead")
    assert lead is not None
    assert "onerror" in lead["label"]
    assert shown(visit(own_store, "lists", part="comments"), "comments-entries") is not None


def test_the_functions_behind_the_pages_refuse(own_store: Path, own_cache: Path) -> None:
    jobs = set(_works())
    with open_store(own_store) as store:
        notes = Here(store, View(sae=store.sae), {}).annotations
        exported = notes.export_json()
        for change in (
            lambda: notes.set_label(3, "x"),
            lambda: notes.set_label(3, ""),
            lambda: notes.bookmark(7),
            lambda: notes.bookmark(3, False),
            lambda: notes.comment(3, "x"),
            lambda: notes.remove_comment(exported["comments"][0]["id"]),
            lambda: notes.add_to_list("x", [3]),
            lambda: notes.remove_from_list(exported["list_entries"][0]["name"], 3),
            lambda: notes.rename_list(exported["list_entries"][0]["name"], "x"),
            lambda: notes.remove_list(exported["list_entries"][0]["name"]),
            lambda: notes.save_view("x", ""),
            lambda: notes.remove_view(exported["views"][0]["name"]),
            lambda: notes.import_json(exported),
        ):
            with pytest.raises(UserError, match="read-only"):
                change()
        assert notes.export_json() == exported
        with pytest.raises(UserError, match="SQL queries are off"):
            sql._answer_of(store, "SELECT 1", 100)
    with pytest.raises(UserError, match="jobs are off"):
        start(Task("check", {"store": str(own_store)}, ("x",)))
    assert set(_works()) == jobs
