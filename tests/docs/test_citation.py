"""CITATION.cff is valid CFF 1.2.0 and cites every paper that the code names."""

from __future__ import annotations

import re

import yaml

import saebench
from tests.docs.pages import PAGES, ROOT

CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
REQUIRED = {"cff-version", "message", "title", "authors"}
PERSON_OR_ENTITY = {"family-names", "given-names", "name"}


def test_citation_has_the_keys_that_cff_requires() -> None:
    assert CITATION.keys() >= REQUIRED and CITATION["cff-version"] == "1.2.0"
    assert CITATION["license"] == "Apache-2.0" and CITATION["type"] == "software"
    assert CITATION["authors"] == [{"name": "The saebench maintainers"}]
    for reference in CITATION["references"]:
        assert {"type", "title", "authors"} <= reference.keys(), reference
        assert reference["authors"] and all(
            author.keys() <= PERSON_OR_ENTITY for author in reference["authors"]
        )
        assert isinstance(reference["year"], int)


def test_every_paper_named_in_the_code_is_cited_and_no_other() -> None:
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("saebench", "kernels")
        for path in sorted((ROOT / folder).rglob("*.py"))
    )
    named = set(re.findall(r"arXiv\s+(?:\n\s*)?(\d{4}\.\d{5})", code))
    cited = {
        reference["identifiers"][0]["value"].removeprefix("arXiv:") for reference in CITATION["references"]
    }
    assert cited == named


def test_versions_agree() -> None:
    newest = re.search(r"^## (\d+\.\d+\.\d+)", PAGES["CHANGELOG.md"], re.MULTILINE)
    assert newest is not None
    assert CITATION["version"] == newest[1] == saebench.__version__
