"""A transcoder and a crosscoder of the tiny model, with the cache and the store of both, for tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from saebench.activations.cache import ActivationCache
from saebench.activations.harvest import harvest
from saebench.runs.run import load
from saebench.saes.base import Batch
from saebench.saes.spec import SiteWidth
from saebench.saes.topk import TopKSAE
from saebench.store.build import index

READ, WRITTEN = SiteWidth("blocks.0.mlp.hook_post", 128), SiteWidth("blocks.0.hook_mlp_out", 32)
FIRST, LAST = SiteWidth("blocks.0.hook_resid_post", 32), SiteWidth("blocks.1.hook_resid_post", 32)
D_SAE, K = 24, 4
FIRST_ONLY, LAST_ONLY, OPPOSED, NOTHING = range(4)
"""Latents of the crosscoder with planted decoder rows."""


@dataclass(frozen=True)
class TwoSided:
    store: Path
    cache: ActivationCache
    runs: dict[str, Path]

    def sae(self, name: str) -> TopKSAE:
        sae = load(self.runs[name])
        assert isinstance(sae, TopKSAE)
        return sae


def build_two_sided(folder: Path, model: Path, text: Path) -> TwoSided:
    """``store`` has the SAEs transcoder and crosscoder; their weights are initial, but for planted rows."""
    sites = [site.name for site in (READ, WRITTEN, FIRST, LAST)]
    cache = harvest(
        model=str(model), text=str(text), hook=sites, tokens=700, ctx=32, dtype="fp32", shard_rows=32_768,
        out=folder / "cache", quiet=True,
    )  # fmt: skip
    x, y, first, last = (cache.activations(name) for name in sites)
    transcoder = TopKSAE(
        TopKSAE.Spec(d_sae=D_SAE, k=K, sites=(READ,), targets=(WRITTEN,), skip=True), READ.width
    )
    transcoder.initialize(Batch(x, target_NE=y), seed=0)
    both = (FIRST, LAST)
    crosscoder = TopKSAE(TopKSAE.Spec(d_sae=D_SAE, k=K, sites=both, targets=both), 64)
    crosscoder.initialize(Batch(torch.cat([first, last], dim=1)), seed=0)
    with torch.no_grad():
        torch.nn.init.normal_(transcoder.W_skip, generator=torch.Generator().manual_seed(1))
        crosscoder.W_dec[FIRST_ONLY, 32:] = 0
        crosscoder.W_dec[LAST_ONLY, :32] = 0
        crosscoder.W_dec[OPPOSED, 32:] = -crosscoder.W_dec[OPPOSED, :32]
        crosscoder.W_dec[NOTHING] = 0
    runs = {"transcoder": folder / "runs" / "transcoder", "crosscoder": folder / "runs" / "crosscoder"}
    for name, sae in (("transcoder", transcoder), ("crosscoder", crosscoder)):
        sae.save(runs[name], hook_name=sae.spec.sites[0].name, model=cache.model)
    index(
        run=runs["transcoder"], also=[runs["crosscoder"]], cache=cache.path, out=folder / "store", quiet=True,
        examples=3, window=8,
    ).close()  # fmt: skip
    return TwoSided(folder / "store", cache, runs)
