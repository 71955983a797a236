"""A run on the tiny model: an SAE that was initialized on its activations, but not trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from saebench.activations.cache import ActivationCache
from saebench.saes.base import SAE, Batch
from saebench.saes.registry import architecture
from saebench.sources.models import Model, load_model

D_SAE, K = 96, 6

MakeSae = Callable[[str], SAE]


@pytest.fixture(scope="session")
def hook() -> str:
    return "blocks.0.hook_resid_post"


@pytest.fixture(scope="session")
def tiny_model(tiny_model_folder: Path) -> Model:
    return load_model(str(tiny_model_folder))


@pytest.fixture(scope="session")
def make_sae(tiny_cache: ActivationCache, hook: str) -> MakeSae:
    """``make_sae(architecture)``: an initialized SAE that can encode."""

    def make(name: str) -> SAE:
        x_ND = tiny_cache.activations(hook)[:600].float()
        gradient_ND = torch.randn(x_ND.shape, generator=torch.Generator().manual_seed(1))
        sae_class = architecture(name)
        sae: SAE = sae_class(sae_class.Spec(d_sae=D_SAE, k=K), x_ND.shape[1])
        sae.initialize(Batch(x_ND, gradient_ND), seed=0)
        sae.calibrate(x_ND)
        return sae

    return make


@pytest.fixture(scope="session")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_cache: ActivationCache, make_sae: MakeSae, hook: str
) -> Path:
    path = tmp_path_factory.mktemp("runs") / "tiny"
    make_sae("topk").save(path, hook_name=hook, model=tiny_cache.model)
    (path / "run.json").write_text(
        json.dumps({"format_version": 1, "train": {"cache": str(tiny_cache.path)}})
    )
    return path
