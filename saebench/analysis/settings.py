"""Settings of the analyses that are commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from saebench.core.bounds import AtLeast, Seed
from saebench.core.settings import Settings


@dataclass(frozen=True, kw_only=True)
class EffectsConfig(Settings):
    """Measure what the model's loss changes without each latent, as columns of a store's feature table."""

    store: Path
    """Directory of the feature store; it gets a new generation."""
    run: Path
    """The run directory of an SAE that is in the store."""
    cache: Path | None = None
    """Activation cache that it was indexed over; by default the one the run was trained on."""
    model: str = "cache"
    """Model that reads the contexts; 'cache' is the one that made the cache."""
    contexts: Annotated[int, AtLeast(0)] = 4
    """Each latent is taken out of so many contexts, at most; 0 for first-order estimates alone."""
    sample: Annotated[int, AtLeast(1)] = 256
    """Contexts of the cache that are looked at, at most."""
    rows: Literal["held-out", "all"] = "held-out"
    """'all' includes contexts that the SAE was trained on."""
    seed: Seed = 0
    """Seeds the choice of contexts."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda' or 'cuda:1'."""
    quiet: bool = False
    """No progress display."""
