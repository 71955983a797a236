"""Settings of the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from saebench.core.bounds import AtLeast
from saebench.core.settings import Settings
from saebench.saes.spec import SaeSpec


@dataclass(frozen=True, kw_only=True)
class BenchConfig(Settings):
    """Compare the speed of training steps with other libraries and with a plain matrix product.

    On a GPU (default), it times encoders and training steps at three fixed sizes, and compares them with
    plain torch and with sae-lens, eai-sparsify and dictionary-learning, if these can be imported. With --cpu,
    it compares training steps with SAELens. With --store, it measures the feature store.
    """

    cpu: bool = False
    """Measure on the CPU, even if there is a GPU."""
    store: bool = False
    """Measure the feature store instead: build time, size and query times."""
    store_activations: Annotated[int, AtLeast(1)] = 60_000_000
    """With --store: activations of the synthetic store."""
    store_features: int = 16_384
    """With --store: number of latents."""
    peers: Path = Path(".venv-peers")
    """With --cpu: virtual environment with sae-lens, made by 'make peers'; without it, SAELens is not
    measured."""
    d_in: Annotated[int, AtLeast(1)] = 256
    """With --cpu: width of an activation."""
    d_sae: int = 4096
    """With --cpu: number of latents."""
    k: int = 32
    """With --cpu: active latents per token."""
    batch_size: Annotated[int, AtLeast(1)] = 4096
    """With --cpu: rows in a step."""
    threads: Annotated[int, AtLeast(1)] = 2
    """With --cpu: threads of each process."""
    turns: Annotated[int, AtLeast(1)] = 5
    """Rounds of measurements; each round measures every entry twice."""
    out: Path | None = None
    """JSON file for the results."""
    quiet: bool = False
    """No progress display."""

    def __post_init__(self) -> None:
        super().__post_init__()
        SaeSpec(d_sae=self.d_sae, k=self.k)
        SaeSpec(d_sae=self.store_features, k=self.k)
