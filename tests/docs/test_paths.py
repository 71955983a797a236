"""Every path and link of the pages leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, plain

FOLDERS = ("saebench", "app", "kernels", "data", "tests", "docs")
PLANNED = re.compile(r"<!-- planned: begin -->.*?<!-- planned: end -->", re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_paths_exist(page: str) -> None:
    text = PLANNED.sub("", PAGES[page])
    for path in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("docs/")])
def test_links_lead_to_files(page: str) -> None:
    """Links of the pages in docs/ are checked on the built site."""
    for target in re.findall(r"\]\(([^)]+)\)", plain(PAGES[page])):
        if not target.startswith(("http://", "https://", "#")):
            assert ((ROOT / page).parent / Path(target.partition("#")[0])).exists(), target
