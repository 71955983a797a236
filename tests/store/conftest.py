from __future__ import annotations

from pathlib import Path

import pytest

from tests.store.small_store import build_small_store


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the small store; tests must not change it."""
    return build_small_store(tmp_path_factory.mktemp("small") / "store")


@pytest.fixture(scope="session")
def textless_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same store without tokens and contexts, as for an imported array."""
    return build_small_store(tmp_path_factory.mktemp("textless") / "store", text=False)
