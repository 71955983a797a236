"""What every test may ask for: caches of arrays, and a tiny language model with a cache made from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saebench.activations.cache import ActivationCache
from saebench.activations.importing import import_activations

MakeCache = Callable[..., ActivationCache]


@pytest.fixture(scope="session")
def make_cache(tmp_path_factory: pytest.TempPathFactory) -> MakeCache:
    """``make_cache(path, array, dtype=..., hook=...)`` -> the cache of an [n, d_in] tensor or array."""
    from safetensors.torch import save_file

    def make(path: Path, array: Any, **settings: Any) -> ActivationCache:
        source = tmp_path_factory.mktemp("arrays") / "array.safetensors"
        save_file({"array": torch.as_tensor(array).contiguous()}, source)
        settings = {"shard_rows": 32_768, "quiet": True, **settings}
        return import_activations(source=source, out=path, **settings)

    return make
