from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.torture.damaged_files import make_world


@pytest.fixture(scope="session")
def _world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("torture") / "world"
    make_world(place)
    return place


@pytest.fixture
def folder(_world: Path, tmp_path: Path) -> Path:
    """A folder with a small file of every kind, in ``world``, which a test may damage."""
    shutil.copytree(_world, tmp_path / "world")
    return tmp_path
