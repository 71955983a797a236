"""Every Python block runs, every command line parses, and those without a title run too.

A title on a block of shell commands says what it needs: time, a GPU, a network, another file.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections import defaultdict
from pathlib import Path

import pytest

from saebench.cli import app, main
from tests.docs.pages import PAGES, ROOT, blocks, command_lines, plain

QUICKSTART = "docs/quickstart.md"
SMALLER = {
    "tokens=200_000": "tokens=36_000",
    "tokens=1_000_000": "tokens=60_000",
    'model="demo")  # on documents': 'model="demo", tokens=2_000)  # on documents',
    "d_sae=1024": "d_sae=64",
    "k=32": "k=8",
}
"""Numbers of the pages -> numbers with which they take seconds."""

PYTHON = defaultdict(str)
for _block in blocks("python"):
    PYTHON[_block.page] += _block.code  # later blocks of a page continue from earlier ones
SHELL = [(block.page, block.title, line) for block in blocks("sh") for line in command_lines(block.code)]
RUNNABLE: dict[str, list[str]] = defaultdict(list)
for _page, _title, _line in SHELL:
    if not _title:
        RUNNABLE[_page].append(_line)  # later lines of a page use what earlier ones made


@functools.cache
def parser(argv: tuple[str, ...]) -> app.App:
    """The tree of commands for such words."""
    return app.build(argv)


def run_page(page: str) -> None:
    """Run the Python of a page as one program."""
    code = PYTHON[page]
    for number, smaller in SMALLER.items():
        code = code.replace(number, smaller)
    exec(compile(code, page, "exec", dont_inherit=True), {"__name__": "__main__"})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the quickstart leaves: cache, runs/a and store."""
    directory = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        run_page(QUICKSTART)
    return directory


def test_quickstart_leaves_a_cache_a_run_and_a_store(world: Path) -> None:
    assert {"cache", "runs", "store"} <= {path.name for path in world.iterdir()}
    assert all(number in PYTHON[QUICKSTART] for number in SMALLER)


@pytest.mark.parametrize("page", [page for page in PYTHON if page not in (QUICKSTART, "README.md")])
def test_python_blocks_run(
    page: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    run_page(page)
    if page == "docs/recipes/prompts.md":
        said = capsys.readouterr().out
        assert len(re.findall(r"^ +\d+  We must", said, re.MULTILINE)) == 2
        assert re.search(r"without feature \d+: KL \d\.\d\d nats", said)


def test_python_of_the_readme_is_part_of_the_quickstart() -> None:
    """So that running the quickstart runs it too."""
    lines = [line for line in PYTHON["README.md"].splitlines() if line.strip()]
    rest = iter(PYTHON[QUICKSTART].splitlines())
    assert lines and all(line in rest for line in lines)


@pytest.mark.parametrize("line", sorted({line for *_, line in SHELL}))
def test_command_lines_parse(line: str) -> None:
    words = shlex.split(line)
    known = words if words[0] == "train" else words[:1]  # flags of train depend on its architecture
    parser(tuple(known)).parse_args(words, exit_on_error=False, print_error=False)


@pytest.mark.parametrize("page", RUNNABLE)
def test_command_lines_without_a_title_run(
    page: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    for line in RUNNABLE[page]:
        assert main(shlex.split(line)) == 0, f"{line}: {capsys.readouterr().err}"


def test_command_lines_stand_in_marked_blocks() -> None:
    """No command line outside a block of shell commands, where no test would see it."""
    for page, text in PAGES.items():
        assert not re.findall(r"^ {4}saebench .*$", plain(text), re.MULTILINE), page
        assert not [block.code for block in blocks("") if command_lines(block.code)], page


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for block in blocks("sh"):
        for words in re.findall(r"^make ([a-z -]+)", block.code, re.MULTILINE):
            assert set(words.split()) <= targets, block
    for page, text in PAGES.items():
        if page != "CHANGELOG.md":
            assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets, page
