"""Low-precision copies of weights, made again only when the weights have changed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``, without gradients; the copy of a parameter is kept and reused.

    The parameter's version number tells whether a kept copy is up to date: every operation of torch that
    changes the parameter makes it stale, except operations on ``parameter.data``. The fused `adam_step`
    changes parameter and copy together, without changing the version number.
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
    """The kept copy of a parameter, or None if there is none that is up to date."""
    kept, state = getattr(parameter, "_saebench_rounded", (None, None))
    return kept if state == _state(parameter) else None


def _state(parameter: Tensor) -> tuple[int, int]:
    return parameter._version, parameter.data_ptr()
