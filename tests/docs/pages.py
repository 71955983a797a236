"""The Markdown pages of the project, their code blocks and their command lines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
OTHER_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/saebench_data/README.md")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [*(ROOT / name for name in OTHER_PAGES), *sorted((ROOT / "docs").rglob("*.md"))]
    if path.exists()
}
"""Path in the repository -> text of each page that is committed."""

_BLOCK = re.compile(r"^```(\w*)(?: +title=\"([^\"]*)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of code. A ``title`` says what a block needs that the tests do not have."""

    page: str
    language: str
    title: str
    code: str


def blocks(language: str) -> list[Block]:
    """All blocks of a language, in the order of the pages."""
    return [
        Block(page, found[1], found[2] or "", found[3])
        for page, text in PAGES.items()
        for found in _BLOCK.finditer(text)
        if found[1] == language
    ]


def command_lines(code: str) -> list[str]:
    """The ``saebench ...`` lines of shell code, without that word; also those inside a loop."""
    joined = code.replace("\\\n", " ")
    return [found.strip() for found in re.findall(r"(?:^|do )saebench +([^;\n]+)", joined, re.MULTILINE)]


def plain(text: str) -> str:
    """The text of a page without its code blocks."""
    return _BLOCK.sub("", text)
