"""Safetensors files: reading them, and checking that they hold the expected tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saebench.core.errors import UserError
from saebench.core.files import sha256_file
from saebench.core.reading import require_file


def read_safetensors(file: Path, *, way_out: str, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name.

    ``way_out`` is the end of the error sentence: what the user can do when the file cannot be read.
    ``sha256`` is the checksum that the file must have, if one was recorded.

    Raises:
        UserError: the file does not exist, cannot be read, or has another checksum.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    require_file(file, what="the file", way_out=way_out)
    try:
        seen = sha256 and sha256_file(file)
        tensors: dict[str, Tensor] = load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; {way_out}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}); {way_out}") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{file} is damaged or not a safetensors file ({error}); {way_out}") from None
    if seen != sha256:
        raise UserError(
            f"{file} is damaged: its SHA-256 is {str(seen)[:12]}..., but {str(sha256)[:12]}... is recorded; "
            f"{way_out}"
        )
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file that was just read."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata() or {})


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors on the CPU: of the name, type, shape and bytes of each, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], file: Path) -> None:
    """Raise a UserError unless ``tensors`` has every tensor in ``expected``, with that shape and finite."""
    if missing := _first(name for name in expected if name not in tensors):
        raise UserError(f"{file} has no tensor {missing!r}; it does not belong to this SAE")
    for name, shape in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise UserError(f"{file}: {name} has shape {tuple(tensor.shape)} where {shape} is expected")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{file}: {name} holds values that are not finite; restore an earlier copy")


def as_rows(value: Any, name: str, *, width: int, device: torch.device) -> Tensor:
    """``value`` as a float32 tensor on ``device``, its last axis ``width`` wide; a tensor keeps its graph.

    It may be a tensor of any real type, a numpy array, or a list of numbers.

    Raises:
        UserError: it is none of these, or of another width.
    """
    try:
        x = value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(
            f"{name} is a {type(value).__name__}; give a tensor, a numpy array or a list of numbers with a "
            f"last axis of {width}"
        ) from None
    if x.is_complex() or x.is_sparse:
        raise UserError(f"{name} is a {'complex' if x.is_complex() else 'sparse'} tensor; give real numbers")
    if x.ndim == 0 or x.shape[-1] != width:
        raise UserError(f"{name} has shape {tuple(x.shape)}; its last axis must be {width} wide")
    return x.to(device, torch.float32)


def _first(names: Iterable[str]) -> str | None:
    return next(iter(names), None)
