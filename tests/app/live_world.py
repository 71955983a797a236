"""A run on the tiny model and the store of its features, for the pages that run the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from saebench.activations.cache import ActivationCache
from saebench.saes.base import Batch
from saebench.saes.topk import TopKSAE
from saebench.store.build import index

HOOK = "blocks.0.hook_resid_post"
D_SAE, K = 64, 4


@dataclass(frozen=True)
class World:
    """``store`` and ``runs/tiny`` are in one folder, as `saebench demo` leaves them."""

    store: Path
    run: Path


def build_world(folder: Path, cache: ActivationCache, *, runs: str = "runs", seed: int = 0) -> World:
    """Make an SAE on the tiny cache, save it as a run, and index it into ``folder``/store."""
    x_ND = cache.activations(HOOK)[:600].float()
    sae = TopKSAE(TopKSAE.Spec(d_sae=D_SAE, k=K), x_ND.shape[1])
    sae.initialize(Batch(x_ND), seed=seed)
    run = folder / runs / "tiny"
    sae.save(run, hook_name=HOOK, model=cache.model)
    settings = {"format_version": 1, "train": {"cache": str(cache.path)}}
    (run / "run.json").write_text(json.dumps(settings), "utf-8")
    index(
        run=run, cache=cache.path, out=folder / "store", name="tiny", with_context_index=True, quiet=True
    ).close()
    return World(folder / "store", run)
