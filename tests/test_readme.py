"""The README is true: its commands exist, its example runs, what it points to is there."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import saebench as sb
from saebench.cli import app
from saebench.saes.registry import ALIASES, ARCHITECTURES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALLER = {"tokens=200_000": "tokens=40_000", "tokens=1_000_000": "tokens=100_000", "d_sae=1024": "d_sae=256"}


def commands() -> set[str]:
    """Every command of the program, such as 'train' and 'cache info'."""
    tree, found = app.build(()), set()
    for name in tree:
        if not name.startswith("-"):
            inner = [n for n in tree[name] if not n.startswith("-")]
            found |= {f"{name} {n}" for n in inner} or {name}
    return found


def test_the_table_has_every_command_and_no_other() -> None:
    assert set(re.findall(r"^\| `saebench ([a-z ]+)` \|", README, re.MULTILINE)) == commands()


@pytest.mark.parametrize("line", re.findall(r"^ {4}saebench (.+)$", README, re.MULTILINE))
def test_command_lines_parse(line: str) -> None:
    words = shlex.split(line)
    app.build(words).parse_args(words, exit_on_error=False, print_error=False)


def test_the_table_of_architectures_has_every_one_and_no_other() -> None:
    names = re.findall(r"^\| `([a-z-]+)`(?: \(`([a-z-]+)`\))? \|.*\d{4} \|$", README, re.MULTILINE)
    assert {name for name, _ in names} == set(ARCHITECTURES)
    assert {(alias, name) for name, alias in names if alias} == set(ALIASES.items())


def test_the_table_of_the_api_has_every_function_and_figure() -> None:
    named = set(re.findall(r"^\| `sb\.(\w+)", README, re.MULTILINE))
    public = {name for name in sb.__all__ if inspect.isfunction(getattr(sb, name))}
    assert named == public | {"figures"}
    [row] = re.findall(r"^\| `sb\.figures\..*$", README, re.MULTILINE)
    assert {name for name in re.findall(r"\w+", row) if name in dir(sb.figures)} >= set(sb.figures.__all__)


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    documented = set(re.findall(r"^ {4}make ([a-z-]+)", README, re.MULTILINE))
    assert documented == {"demo", "demo-all", "test"}
    assert documented | {"check", "format", "test-slow", "peers"} <= targets


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_example_runs(tmp_path: Path) -> None:
    code = "".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))  # the later go on from the first
    for number, smaller in SMALLER.items():
        assert number in code
        code = code.replace(number, smaller)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"explained variance 0\.\d{3}, CE loss score -?\d+\.\d{3}", done.stdout)
    assert done.stdout.count("We must") == 2
    assert re.search(r"without feature \d+: KL \d\.\d\d nats", done.stdout)
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "map.html", "runs", "store"}
