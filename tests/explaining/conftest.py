from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.store.small_store import SmallCache, build_small_store, build_store, small_options, small_sae


@pytest.fixture(scope="session")
def wide_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store over 400 contexts, in which every live latent fires often; tests must not change it."""
    path = tmp_path_factory.mktemp("wide") / "store"
    build_store(path, small_sae(), SmallCache(n_contexts=400), small_options(), no_logits="not needed")
    return path


@pytest.fixture(scope="session")
def two_saes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two SAEs, "small" over 60 contexts and "other" over 10; tests must not change it."""
    store = tmp_path_factory.mktemp("two") / "store"
    build_store(store, small_sae(), SmallCache(n_contexts=60), small_options(), no_logits="not needed")
    return build_small_store(store, name="other", seed=1)


@pytest.fixture
def own_store(two_saes: Path, tmp_path: Path) -> Path:
    """A copy of the store with two SAEs, which a test may change."""
    return shutil.copytree(two_saes, tmp_path / "store")
