"""Safetensors files: reading them, and checking that they hold the expected tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from saebench.core.errors import UserError


def read_safetensors(file: Path, *, way_out: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name.

    ``way_out`` is the end of the error sentence: what the user can do when the file cannot be read.

    Raises:
        UserError: the file does not exist or cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; {way_out}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}); {way_out}") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{file} is damaged or not a safetensors file ({error}); {way_out}") from None
    return tensors


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


def _first(names: Iterable[str]) -> str | None:
    return next(iter(names), None)
