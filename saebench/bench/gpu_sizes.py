"""The problems that are measured on a GPU, and how a contestant comes to one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Once = Callable[[], object]
"""Does it once, and need not wait for the GPU."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A problem of the benchmark."""

    name: str
    batch_size: int
    d_in: int
    d_sae: int
    k: int
    only_topk: bool = False
    """Of ours, the TopK step alone is measured."""


SIZES = (
    Size(name="S1", batch_size=8192, d_in=768, d_sae=24_576, k=32),
    Size(name="S2", batch_size=8192, d_in=2304, d_sae=65_536, k=64),
    Size(name="S3", batch_size=8192, d_in=4096, d_sae=131_072, k=64, only_topk=True),
)
"""GPT-2 small, 32 latents a dimension; Gemma 2 2B, 28; a model of 7 or 8 billion parameters, 32."""

Make = Callable[[Size, Tensor], Once]
"""Makes a contestant for batches of rows [B, N, D], on their device; may raise what its library raises."""
