from __future__ import annotations

from pathlib import Path

import pytest

from saebench.store.build import build_store
from tests.store.small_store import SmallCache, build_small_store, small_options, small_sae


@pytest.fixture(scope="session")
def wide_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small world with 400 contexts, so that every live latent fires often; read it, do not change it."""
    path = tmp_path_factory.mktemp("wide") / "store"
    build_store(path, small_sae(), SmallCache(n_contexts=400), small_options(), no_logits="not needed")
    return path


@pytest.fixture
def own_store(tmp_path: Path) -> Path:
    """A store with two SAEs that a test may change."""
    store = build_small_store(tmp_path / "store")
    build_store(store, small_sae(), SmallCache(n_contexts=60), small_options(), no_logits="not needed")
    return build_small_store(store, name="other", seed=1)
