"""Extraction of prose from HTML documentation: paragraphs without programs, tables and navigation."""

from __future__ import annotations

import re
from html.parser import HTMLParser

BLOCKS = re.compile(
    "p|div|h[1-6]|li|ul|ol|dl|dt|dd|blockquote|section|article|header|footer|hr|body|br|center"
)
# Programs, tables and drawings are not prose.
SKIPPED = re.compile("head|script|style|select|form|pre|table|svg|button|noscript|title|textarea")
VOID = re.compile("area|base|br|col|embed|hr|img|input|link|meta|source|track|wbr")
# Navigation, tables of contents and programs, by their class names in SQLite's and PostgreSQL's pages.
SKIPPED_CLASSES = re.compile(
    "nosearch|navheader|navfooter|fancy_toc|toc|indexterm|imgcontainer|menu|searchmenu|codeblock|programlisting|"
    "screen|synopsis|cmdsynopsis|refsynopsisdiv"
)

MIN_PARAGRAPH = 25  # characters; shorter ones are headings of skipped parts, versions, single names


class _Prose(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._pieces: list[str] = []
        self._skipping: list[str] = []  # open tags since the outermost skipped one

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if BLOCKS.fullmatch(tag):
            self._end_paragraph()
        if VOID.fullmatch(tag):
            return
        classes = (dict(attrs).get("class") or "").split()
        if self._skipping or SKIPPED.fullmatch(tag) or any(map(SKIPPED_CLASSES.fullmatch, classes)):
            self._skipping.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._skipping:  # closing an element also closes the open elements inside it
            while self._skipping.pop() != tag:
                pass
        if BLOCKS.fullmatch(tag):
            self._end_paragraph()

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._pieces.append(data)

    def close(self) -> None:
        super().close()
        self._end_paragraph()

    def _end_paragraph(self) -> None:
        paragraph = " ".join("".join(self._pieces).split())
        self._pieces.clear()
        if len(paragraph) >= MIN_PARAGRAPH:
            self.paragraphs.append(paragraph)


PAGE_FOOTER = re.compile(r"^This page (was )?last (modified|updated)")


def paragraphs_of(html: str) -> list[str]:
    """The paragraphs, headings and list items of one page, in order, with white space collapsed."""
    parser = _Prose()
    parser.feed(html)
    parser.close()
    return [paragraph for paragraph in parser.paragraphs if not PAGE_FOOTER.match(paragraph)]
