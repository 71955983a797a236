"""Test problems for the fused kernels: small ones for Triton's interpreter, small and large ones for a
GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saebench_kernels.fused.scan import Scanned, Tiles, scan

ON_GPU = torch.cuda.is_available()
SLOW_INTERPRETED = [] if ON_GPU else [pytest.mark.slow]
"""Marks of a problem that Triton's interpreter needs more than 5 seconds for."""
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
TILES = None if ON_GPU else Tiles(16, 256, 16, 4, 2, 2)
"""On a GPU, those of `tiles_of`."""
HALVES = (torch.bfloat16, torch.float16)

SHAPES = [
    (1, 1, 1, 1),
    (5, 24, 70, 3),
    (17, 7, 33, 33),
    (3, 16, 257, 1),
    (18, 40, 130, 8),
    (2, 8, 300, 70),
    *(
        [(8192, 768, 24576, 32), (4099, 2304, 65537, 64), (127, 63, 100_003, 100), (64, 128, 2048, 1024)]
        * ON_GPU
    ),
]
"""N, D, M, k: single, prime and uneven sizes, k = 1 and k = M."""


def problem(n: int, d: int, m: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, D] and W [M, D] in ``dtype``, b [M] in float32."""
    generator = torch.Generator().manual_seed(seed)
    x_ND, W_MD, b_M = (torch.randn(shape, generator=generator) for shape in ((n, d), (m, d), (m,)))
    return x_ND.to(DEVICE, dtype), W_MD.to(DEVICE, dtype), b_M.to(DEVICE)


def scanned(pre_NM: Tensor) -> Scanned:
    """The scan whose pre-activations are these, which are not negative: x = pre, W = 1."""
    identity = torch.eye(pre_NM.shape[1], dtype=pre_NM.dtype, device=DEVICE)
    return scan(pre_NM.to(DEVICE), identity, torch.zeros(pre_NM.shape[1], device=DEVICE), tiles=TILES)


def score_of(found: Scanned) -> Tensor:
    """[N, P] what latents are chosen by, as the kernels round it."""
    if found.effect_NM is None:
        return found.pre_NP
    score_NP = torch.zeros_like(found.pre_NP)
    m = found.effect_NM.shape[1]
    product_NM = found.pre_NP[:, :m].float() * (1 + found.effect_NM.float().abs())
    if not ON_GPU and product_NM.dtype != score_NP.dtype and score_NP.dtype == torch.bfloat16:
        product_NM = (product_NM.view(torch.int32) & -65536).view(torch.float32)  # the interpreter cuts
    score_NP[:, :m] = product_NM
    return score_NP


def in_total_order(pre_NM: Tensor, k: int) -> Tensor:
    """[N, k], ascending: the k best latents of each row by value descending, then index ascending."""
    order_NM = torch.sort(pre_NM.float().cpu(), dim=1, descending=True, stable=True).indices
    return order_NM[:, :k].sort(1).values
