"""Compile every fused kernel for a GPU that need not be present: ``python compiling.py CAPABILITY``.

The functions that launch the kernels are called with small tensors on the CPU; a launch only compiles. Prints
one JSON object: kernel -> the largest number of bytes of shared memory that it takes.

Shapes: N rows, D = d_in, M = d_sae latents, K kept a row.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before kernels are made

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

N, D, M, K = 256, 768, 512, 32


class NoGpu:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def main(capability: int) -> dict[str, int]:
    shared: dict[str, int] = {}
    compile_and_run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **settings: Any) -> Any:
        compiled = compile_and_run(self, *args, grid=grid, warmup=True, **settings)
        shared[self.__name__] = max(shared.get(self.__name__, 0), compiled.metadata.shared)
        return compiled

    driver.set_active(NoGpu(capability))
    JITFunction.run = compile_only
    torch.empty, torch.empty_like = torch.zeros, torch.zeros_like  # nothing is written to them
    everything(capability)
    return shared


def everything(capability: int) -> None:
    """Call whatever launches a kernel, in each of its forms."""
    from saebench_kernels.fused import scan as scanning
    from saebench_kernels.fused.adam import adam_coefficients, fused_adam, gradient_squares
    from saebench_kernels.fused.by_latent import select_by_latent
    from saebench_kernels.fused.center import center, column_sums
    from saebench_kernels.fused.pursuit import energy_gradients, pursue
    from saebench_kernels.fused.ragged import select_largest, select_positive
    from saebench_kernels.fused.reconstruct import reconstruct
    from saebench_kernels.fused.select import keep_topk, select_topk
    from saebench_kernels.fused.weight_grads import sort_pairs, weight_grads

    hopper = capability >= 90
    scanning._has_tma = lambda device: hopper
    tiles = scanning._HOPPER if hopper else scanning._AMPERE
    of_gradient = scanning._HOPPER_GRADIENT if hopper else tiles
    number = torch.ones(())
    b_M, b_D = torch.zeros(M), torch.zeros(D)
    for dtype in (torch.bfloat16, torch.float16):
        x_ND, W_MD = torch.ones(N, D, dtype=dtype), torch.ones(M, D, dtype=dtype)
        scanned = scanning.scan(x_ND, W_MD, b_M, tiles=tiles)
        select_topk(scanned, K, M)
        keep_topk(torch.zeros(N, M, dtype=dtype), K)
        select_largest(scanned, N * K, number, M)
        select_by_latent(x_ND, W_MD, b_M, torch.zeros(M, dtype=torch.int64), tiles=tiles)
    scanning.scan(x_ND, W_MD, b_M, floor_M=b_M, tiles=tiles)
    select_positive(scanned, M)
    select_topk(scanning.scan(x_ND, W_MD, b_M, g_ND=x_ND, W_dec_MD=W_MD, tiles=of_gradient), K, M)
    scanning.scan(x_ND.float(), W_MD.float(), b_M, tiles=tiles)
    indices_S, values_S = torch.zeros(N * K, dtype=torch.int32), torch.zeros(N * K)
    offsets = torch.arange(N + 1) * K
    for ragged in (False, True):
        how: dict[str, Any] = {"offsets": offsets} if ragged else {"k": K}
        reconstruct(indices_S, values_S, x_ND.float(), W_MD, b_D, **how)
        rows_S = torch.zeros(N * K, dtype=torch.int64) if ragged else None
        pairs = sort_pairs(indices_S, M, k=None if ragged else K, rows_S=rows_S)
        weight_grads(pairs, values_S, values_S, x_ND, x_ND, number)
    for absolute in (False, True):
        found = pursue(x_ND.float(), W_MD.float(), K, tolerance=0.1, absolute=absolute, rounding=1e-6)
    energy_gradients(found, W_MD.float(), number)
    center(x_ND.float(), b_D, torch.bfloat16)
    center(x_ND, None, torch.float32, scale=2.0)
    column_sums(x_ND)
    weights_MD, low_MD = torch.ones(M, D), torch.ones(M, D, dtype=torch.bfloat16)
    squares = gradient_squares(weights_MD, unit=weights_MD)
    gradient_squares(weights_MD)
    finite, betas = torch.ones((), dtype=torch.bool), (0.9, 0.999)
    coefficients, _ = adam_coefficients(squares, number, finite, number.double(), betas=betas, grad_clip=1.0)
    how = {"betas": betas, "eps": 1e-8}
    state = (weights_MD, weights_MD, weights_MD, weights_MD, coefficients)
    fused_adam(*state, **how, project=True, unit_rows=True, low=low_MD)
    fused_adam(*state, **how)


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
