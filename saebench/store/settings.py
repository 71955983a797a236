"""Settings of making, checking, rebuilding and exporting feature stores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from saebench.core.bounds import AtLeast, Seed
from saebench.core.errors import UserError
from saebench.core.settings import Settings
from saebench.store.export_registry import store_exports


@dataclass(frozen=True, kw_only=True)
class IndexConfig(Settings):
    """Encode a cache with an SAE and write a feature store."""

    run: Path
    """A run directory, or a folder with sae.json and sae.safetensors."""
    cache: Path
    """Activation cache."""
    out: Path
    """Directory of the feature store; in an existing store, a new generation is written."""
    also: tuple[Path, ...] = ()
    """Further runs to index in the same pass over the cache."""
    hook: str | None = None
    """Hook of the cache; by default the one that the run was trained on."""
    model: str = "cache"
    """Model for the logits: 'cache' is the one that made the cache, 'none' omits the logits."""
    name: str | None = None
    """Name of the SAE in the store; by default the name of the run directory."""
    examples: Annotated[int, AtLeast(1)] = 20
    """Top examples stored per feature; as many random ones and negatives, and a fifth as many per decile."""
    window: Annotated[int, AtLeast(1)] = 32
    """Tokens shown around an example."""
    batch_size: Annotated[int, AtLeast(1)] = 8192
    """Rows encoded at once."""
    seed: Seed = 0
    """Seeds the choice of random examples."""
    with_context_index: bool = False
    """Also store the activations sorted by context, for pages that show a whole context."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda' or 'cuda:1'."""
    quiet: bool = False
    """No progress display."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.also and self.name is not None:
            raise UserError(f"name is {self.name!r}, but several runs are named; leave it out")


@dataclass(frozen=True, kw_only=True)
class CheckConfig(Settings):
    """Check a feature store: files, checksums, and that its tables agree with each other."""

    store: Path
    """Directory of the feature store."""
    run: Path | None = None
    """Also compare directions with the weights of this run, which is one of the store's SAEs."""
    cache: Path | None = None
    """With --run: also encode a sample of this cache again; it must be the one that was indexed."""
    model: str = "none"
    """With --cache: also compute a sample of the logits again; 'cache' is the model that made the cache."""
    quiet: bool = False
    """No progress display."""


@dataclass(frozen=True, kw_only=True)
class RebuildConfig(Settings):
    """Compute a feature store's tables again from its activations; it may have an older format."""

    store: Path
    """Directory of the feature store."""
    quiet: bool = False
    """No progress display."""


@dataclass(frozen=True, kw_only=True)
class StoreExportConfig(Settings):
    """Export an SAE's features from a feature store in a format that other tools read."""

    store: Path
    """Directory of the feature store."""
    out: Path
    """Directory to write; it must be empty or not exist."""
    format: str = "parquet"
    """'parquet' (the tables), 'html' (one page), 'delphi' (its latent cache), 'neuronpedia' (its JSON),
    or one that another installed package adds."""
    sae: str | None = None
    """Which SAE of the store; the first by default."""
    features: tuple[str | int, ...] = ()
    """Only these features, like 3,17,40-49; all by default."""
    list: str | None = None
    """Only the features of this list, made in the explorer or with annotations.add_to_list."""
    quiet: bool = False
    """No effect: an export has no progress display."""

    def __post_init__(self) -> None:
        super().__post_init__()
        store_exports.canonical(self.format, flag="--format")
        if self.features and self.list is not None:
            raise UserError(f"both features and the list {self.list!r} were named; give one of them")
