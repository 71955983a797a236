"""The lock files: every package that pyproject.toml asks for, at an allowed version, with hashes."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
ASKED = [Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]


def locked(name: str) -> dict[str, tuple[Requirement, list[str]]]:
    """Package -> what a lock file pins, and its hashes."""
    lines = (ROOT / "requirements" / name).read_text("utf-8").replace("\\\n", " ").splitlines()
    rows = [line.split("--hash=") for line in lines if line and not line.startswith("#")]
    return {
        canonicalize_name(Requirement(pin).name): (Requirement(pin), [word.strip() for word in hashes])
        for pin, *hashes in rows
    }


@pytest.mark.parametrize("name", ["build.txt", "lock.txt", "cuda.txt"])
def test_every_package_is_pinned_and_has_hashes(name: str) -> None:
    for pin, hashes in locked(name).values():
        assert re.fullmatch(r"==[^*,]+", str(pin.specifier)), pin
        assert hashes, pin
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes), pin


def test_what_the_project_asks_for_is_locked_at_an_allowed_version() -> None:
    lock = locked("build.txt") | locked("lock.txt")
    for asked in ASKED:
        pin, _ = lock[canonicalize_name(asked.name)]
        assert asked.specifier.contains(str(pin.specifier).removeprefix("==")), asked


def test_lock_names_what_locked_packages_need() -> None:
    """pip does not resolve with --no-deps, so a missing package would only be seen when it is imported."""
    lock, cuda = locked("build.txt") | locked("lock.txt"), locked("cuda.txt")
    for name, (pin, _) in lock.items():
        if pin.marker and not pin.marker.evaluate():
            continue
        for line in importlib.metadata.requires(name) or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert canonicalize_name(needed.name) in lock.keys() | cuda.keys(), f"{name} needs {line}"
