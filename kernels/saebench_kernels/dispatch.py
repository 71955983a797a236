"""The choice between an op's fused kernels and its eager reference.

It is a fixed function of device, type and shape, and never of a measurement, so that runs repeat bit for bit.

| op | fused where |
|---|---|
| topk_encode | CUDA; scan in bfloat16, float16 or tf32; k <= 1024; d_sae <= 2^20 |
| gradient_topk_encode | CUDA; scan in bfloat16 or float16; k <= 1024; d_sae <= 2^20 |
| mutual_choice_encode, threshold_encode | CUDA; scan in bfloat16 or float16; d_sae <= 2^20 |
| feature_choice_encode | the same; N <= 32,768 |
| matching_pursuit_encode | CUDA; scan in bfloat16 or float16; d_sae <= 65,536, <= 8 N |
| reconstruction_loss | CUDA; centered rows in bfloat16 or float16; k <= 1024; d_sae <= 2^20 |
| matching_pursuit_energy | as matching_pursuit_encode |
| center, adam_step | CUDA |

tf32 is float32 where torch.set_float32_matmul_precision allows factors rounded to 10 bits; with full float32
precision the ops are eager. So is everything that the table does not list. All ops are eager on a GPU older
than Ampere, on a GPU that is not torch's current one, where Triton is not installed, and for an empty batch.
"""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch

LARGEST_K = 1024
LARGEST_D_SAE = 1 << 20
_HALF = (torch.bfloat16, torch.float16)
_TF32_OPS = ("topk_encode",)

logger = logging.getLogger("saebench_kernels")


def is_fused(
    op: str, device: torch.device, dtype: torch.dtype, *, k: int = 1, d_sae: int = 1, floats: bool = False
) -> bool:
    """Whether ``op`` is fused for these arguments; warns once, with the reason, where a user may expect it.

    ``floats`` is for ops that are fused in float32, too.
    """
    if device.type != "cuda":
        return False
    current = torch.cuda.current_device()
    reason = why_not_fused(current)
    if reason is None and device.index not in (None, current):
        reason = f"{device} is not the current GPU; call torch.cuda.set_device({device.index}) first"
    if reason is None and not floats and dtype not in _HALF and not (op in _TF32_OPS and _is_tf32(dtype)):
        return False  # the user asked for float32
    if reason is None and k > LARGEST_K:
        reason = f"k = {k} is above {LARGEST_K}"
    if reason is None and d_sae > LARGEST_D_SAE:
        reason = f"d_sae = {d_sae} is above {LARGEST_D_SAE}"
    if reason is not None:
        _warn_once(f"{op} falls back to eager: {reason}")
    return reason is None


def _is_tf32(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"


@functools.cache
def why_not_fused(index: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
    return None


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning(text)
