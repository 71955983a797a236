"""The problem sizes of the GPU benchmark, and the types of its entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Once = Callable[[], object]
"""Launches one call; it need not wait for the GPU."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A problem size of the benchmark."""

    name: str
    batch_size: int
    d_in: int
    d_sae: int
    k: int
    only_topk: bool = False
    """Of our entries, measure only the TopK step."""


SIZES = (
    Size(name="S1", batch_size=8192, d_in=768, d_sae=24_576, k=32),
    Size(name="S2", batch_size=8192, d_in=2304, d_sae=65_536, k=64),
    Size(name="S3", batch_size=8192, d_in=4096, d_sae=131_072, k=64, only_topk=True),
)
"""Widths of GPT-2 small, Gemma 2 2B, and a model with 7 or 8 billion parameters."""

Make = Callable[[Size, Tensor], Once]
"""Makes an entry for batches of rows [B, N, D], on their device; it may raise errors of its library."""
