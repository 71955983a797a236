"""The explorer served for the length of a test, and a browser."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench_app.access import Access
from saebench_app.launch import start_server, stop, wait_until_up

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-gpu",
)
QUIET = """() => new Promise((done, fail) => {
    const drawn = () =>
        document.querySelector('[data-testid="stApp"][data-test-script-state="notRunning"]') &&
        !document.querySelector('[data-testid="stSkeleton"]') &&
        [...document.querySelectorAll('[data-testid="stBidiComponentIsolated"]')]
            .every(host => host.shadowRoot?.querySelector('.root'))
    let timer
    const wait = () => { clearTimeout(timer); timer = setTimeout(look, 150) }
    const look = () => drawn() ? (observer.disconnect(), done()) : wait()
    const observer = new MutationObserver(wait)
    observer.observe(document, { subtree: true, childList: true, attributes: true })
    setTimeout(() => fail(new Error("the page does not settle")), 30000)
    wait()
})"""
"""Resolves once the server has sent the whole page, all elements are drawn and nothing changes any more."""


@contextlib.contextmanager
def served(store: Path, **settings: Any) -> Iterator[str]:
    """The address at which the explorer shows ``store``; ``settings`` are those of ``start_server``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    access = Access("127.0.0.1", port)
    server = start_server(store, access, **settings)
    try:
        assert wait_until_up(server, access), "the server ended"
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(server)


@contextlib.contextmanager
def browser(*more: str) -> Iterator[Browser]:
    """Chromium, with ``more`` flags."""
    from playwright.sync_api import sync_playwright

    flags = [*FLAGS, *more, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        try:
            yield chromium
        finally:
            chromium.close()


def settle(page: Page) -> None:
    """Wait until the page is complete."""
    page.evaluate(QUIET)
