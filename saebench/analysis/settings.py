"""Settings of the analyses that are commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from saebench.core.bounds import AtLeast, Seed
from saebench.core.settings import Settings


@dataclass(frozen=True, kw_only=True)
class EffectsConfig(Settings):
    """Measure how the model's loss changes without each latent, and add it to a store's feature table."""

    store: Path
    """Directory of the feature store; a new generation is written."""
    run: Path
    """The run directory of an SAE that is in the store."""
    cache: Path | None = None
    """Activation cache that was indexed; by default the one that the run was trained on."""
    model: str = "cache"
    """Model that reads the contexts; 'cache' is the one that made the cache."""
    contexts: Annotated[int, AtLeast(0)] = 4
    """Contexts in which each latent is ablated, at most; 0 gives first-order estimates only."""
    sample: Annotated[int, AtLeast(1)] = 256
    """Contexts of the cache to sample, at most."""
    rows: Literal["held-out", "all"] = "held-out"
    """'all' includes contexts that the SAE was trained on."""
    seed: Seed = 0
    """Seeds the choice of contexts."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda' or 'cuda:1'."""
    quiet: bool = False
    """No progress display."""
