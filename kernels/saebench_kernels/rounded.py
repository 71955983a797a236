"""Low-precision copies of weights, made when the weights have changed and not before."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``, without gradients; of a parameter the copy is kept and reused.

    A kept copy is as good as the parameter's version number: every operation of torch that changes the
    parameter makes it stale, save those on ``parameter.data``. ``fused_adam`` changes both behind torch's
    back, the copy with the parameter.
    """
    if tensor.dtype == dtype:
        return tensor.detach()
    if not isinstance(tensor, nn.Parameter) or tensor.is_inference():
        return tensor.detach().to(dtype)
    kept = kept_copy(tensor)
    if kept is None or kept.dtype != dtype or kept.device != tensor.device:
        kept = tensor.detach().to(dtype)
        tensor._saebench_rounded = (kept, _state(tensor))  # type: ignore[attr-defined]
    return kept


def kept_copy(parameter: Tensor) -> Tensor | None:
    """The copy of a parameter that is up to date, if there is one."""
    kept, state = getattr(parameter, "_saebench_rounded", (None, None))
    return kept if state == _state(parameter) else None


def _state(parameter: Tensor) -> tuple[int, int]:
    return parameter._version, parameter.data_ptr()
