"""The site builds without warnings, refers to nothing outside, and has every name, command and column."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import saebench as sb
from saebench.saes.registry import ALIASES, ARCHITECTURES
from saebench.store import schema
from tests.docs.pages import PAGES, ROOT

OUTSIDE = ("http:", "https:", "//")
SOURCES = {"img": "src", "script": "src", "iframe": "src", "source": "src", "link": "href"}
"""Element -> the attribute whose target a browser loads by itself."""


class Page(HTMLParser):
    """The ids, links and loaded files of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if found.get("id"):
            self.ids.add(str(found["id"]))
        if tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))
        if tag in SOURCES and found.get(SOURCES[tag]):
            self.loaded.append(str(found[SOURCES[tag]]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """Every HTML file of a strict build, parsed. Building fails on a broken link or anchor in the sources."""
    directory = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(directory)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {path: Page(path.read_text(encoding="utf-8")) for path in directory.rglob("*.html")}


def test_browser_loads_nothing_from_outside(site: dict[Path, Page]) -> None:
    loaded = {target for page in site.values() for target in page.loaded}
    assert not [target for target in loaded if target.startswith(OUTSIDE)]
    for path in site:
        for style in path.parent.glob("assets/stylesheets/*.css"):
            assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8"))


def test_links_and_anchors_of_the_site_lead_somewhere(site: dict[Path, Page]) -> None:
    for path, page in site.items():
        if path.name == "404.html":  # its links begin at the root of a server
            continue
        for target in [*page.links, *page.loaded]:
            if target.startswith((*OUTSIDE, "mailto:")):
                continue
            parts = urlsplit(target)
            other = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if other.is_dir():
                other = other / "index.html"
            assert other.exists(), f"{path.name}: {target}"
            if parts.fragment and other in site:
                assert unquote(parts.fragment) in site[other].ids | {"__toc", "__drawer"}, f"{path}: {target}"


def page_text(site: dict[Path, Page], name: str) -> str:
    [path] = [path for path in site if str(path).endswith(f"/{name}")]
    return re.sub(r"<[^>]+>", "", path.read_text(encoding="utf-8"))


def test_references_have_every_name_command_architecture_and_column(site: dict[Path, Page]) -> None:
    python = page_text(site, "reference/python.html")
    names = [name for name in sb.__all__ if name not in ("__version__", "figures")]
    for name in [*(f"sb.{name}" for name in names), *(f"sb.figures.{name}" for name in sb.figures.__all__)]:
        assert name in python
    commands = page_text(site, "reference/cli.html")
    for words in ("train", "cache info", "store rebuild", "explore", "assets"):
        assert f"saebench {words}" in commands
    for flag in ("--d-sae", "--no-normalize"):
        assert flag in commands + page_text(site, "reference/architectures.html")
    for name in (*ARCHITECTURES, *ALIASES):
        assert name in page_text(site, "reference/architectures.html")
    tables = page_text(site, "reference/tables.html")
    known = [*schema.SAE_TABLES.values(), *schema.TEXT_TABLES.values()]
    known += [table for extra in schema.EXTRA_TABLES.values() for table in extra.values()]
    for table in known:
        assert re.search(rf"\b{table.name}\b", tables)
        for column in table.columns:
            assert re.search(rf"\b{column.name}\b", tables), column.name


def test_the_table_of_architectures_has_every_one_and_no_other() -> None:
    text = PAGES["docs/architectures.md"]
    names = re.findall(r"^\| `([a-z-]+)`(?: \(`([a-z-]+)`\))? \|.*\d{4} \|$", text, re.MULTILINE)
    assert {name for name, _ in names} == set(ARCHITECTURES)
    assert {(alias, name) for name, alias in names if alias} == set(ALIASES.items())
