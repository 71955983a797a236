from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash

import saebench_app.serve
from saebench.activations.cache import ActivationCache
from tests.app.live_world import World, build_world
from tests.app.two_saes import build_two
from tests.store.rich_store import build_rich_store
from tests.store.small_store import build_small_store


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_store(tmp_path_factory.mktemp("app") / "store")


@pytest.fixture(scope="session")
def rich_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with explanations, effects and annotations, all hostile; tests must not change it."""
    return build_rich_store(tmp_path_factory.mktemp("app") / "store")


@pytest.fixture(scope="session")
def textless_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_store(tmp_path_factory.mktemp("app") / "store", text=False)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_cache: ActivationCache) -> World:
    return build_world(tmp_path_factory.mktemp("world"), tiny_cache)


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two SAEs, with their runs beside it."""
    return build_two(tmp_path_factory.mktemp("two"))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, in which jobs keep their results."""
    monkeypatch.setenv("SAEBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def finish(app: AppTest, seconds: float = 60) -> AppTest:
    """Wait until the jobs of the page have ended, as the page does, and run the page again."""
    from saebench_app.work import _works

    end = time.monotonic() + seconds
    while any(work.state() == "running" for work in _works().values()):
        assert time.monotonic() < end, "the work does not end"
        time.sleep(0.05)
    return app.run()


@pytest.fixture
def visit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AppTest]:
    """``visit(store, "feature", f=3)``: the app at /feature?f=3, as the server would run it."""

    def open_page(store: Path, page: str = "store", **query: object) -> AppTest:
        monkeypatch.setattr(sys, "argv", ["main.py", str(store)])
        app = AppTest.from_file(saebench_app.serve.MAIN, default_timeout=30)
        app._page_hash = calc_hash(page)  # what switch_page does for pages that are files
        for name, value in query.items():
            app.query_params[name] = str(value)
        return app.run()

    return open_page


def shown(app: AppTest, key: str) -> dict[str, Any] | None:
    """The data of the element with this key; None when it is not on the page."""
    for element in app.get("bidi_component"):
        if element.proto.id.endswith(f"-{key}"):
            data: dict[str, Any] = json.loads(element.proto.json)
            return data
    return None


def column(app: AppTest, label: str, key: str = "features") -> list[Any]:
    """One column of a table on the page, as the exact values or else the texts."""
    data = shown(app, key)
    assert data is not None
    at = [heading["label"] for heading in data["headings"]].index(label)
    return [row[at].get("exact", row[at].get("text")) for row in data["rows"]]


def url(app: AppTest) -> dict[str, str]:
    """The query parameters as texts; AppTest keeps lists."""
    return {name: value[0] if isinstance(value, list) else value for name, value in app.query_params.items()}
