"""A browser and served stores. Without Chromium these tests are skipped, except in CI."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from saebench.activations.cache import ActivationCache
from tests.app.live_world import World, build_world
from tests.end_to_end.serving import CHROMIUM, browser, served, settle
from tests.store.small_store import build_small_store

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, ConsoleMessage, Page

if CHROMIUM is None:
    if os.environ.get("CI") == "true":
        pytest.exit("the browser tests need chromium (apt-get install chromium)", returncode=1)
    collect_ignore_glob = ["test_*.py"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if CHROMIUM is None:
        terminalreporter.write_line("SKIPPED tests/end_to_end: no chromium (apt-get install chromium)")


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_store(tmp_path_factory.mktemp("browser") / "store")


@pytest.fixture(scope="session")
def address(small_store: Path) -> Iterator[str]:
    with served(small_store) as address:
        yield address


@pytest.fixture(scope="session")
def context() -> Iterator[BrowserContext]:
    """One browser context for all tests: its pages share the browser's cache."""
    with browser() as chromium:
        yield chromium.new_context(viewport={"width": 1366, "height": 900})


@dataclass
class Visitor:
    """A browser page, with its requests to other machines, errors and dialogs."""

    page: Page
    address: str
    foreign: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def go(self, path: str) -> Page:
        """Load ``path``, as a link from another site does."""
        self.page.goto(f"{self.address}/{path}")
        self.page.wait_for_selector("h1, [role=alert]")
        settle(self.page)
        return self.page

    def watch(self) -> None:
        self.page.on("request", lambda request: self._on_request(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._on_console)
        self.page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))

    def _on_request(self, url: str) -> None:
        if not url.startswith((f"{self.address}/", "data:", f"blob:{self.address}/")):
            self.foreign.append(url)

    def _on_console(self, message: ConsoleMessage) -> None:
        # Streamlit first requests these below the path of the page, where they do not exist.
        expected = message.location["url"].endswith(("/_stcore/health", "/_stcore/host-config"))
        if message.type == "error" and not expected:
            self.errors.append(message.text)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_cache: ActivationCache) -> World:
    return build_world(tmp_path_factory.mktemp("world"), tiny_cache)


@pytest.fixture(scope="session")
def world_address(world: World) -> Iterator[str]:
    with served(world.store) as address:
        yield address


@pytest.fixture
def visitor(context: BrowserContext, address: str) -> Iterator[Visitor]:
    yield from _watched(context, address)


@pytest.fixture
def asker(context: BrowserContext, world_address: str) -> Iterator[Visitor]:
    """A visitor to a store whose model can be run."""
    yield from _watched(context, world_address)


def _watched(context: BrowserContext, address: str) -> Iterator[Visitor]:
    """A fresh visitor; afterwards it must have seen no error, dialog or request to another machine."""
    visitor = Visitor(context.new_page(), address)
    visitor.watch()
    try:
        yield visitor
    finally:
        visitor.page.close()
    assert (visitor.foreign, visitor.errors, visitor.dialogs) == ([], [], [])
