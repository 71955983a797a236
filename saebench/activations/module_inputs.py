"""What a ModuleSource is given: patterns of sites, batches, and columns; checked and made plain."""

from __future__ import annotations

import copy
import difflib
import hashlib
import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saebench.activations.manifest import is_plain_name, is_site_name
from saebench.core.errors import UserError

RESERVED_COLUMNS = ("held_out", "keep")
"""Columns with a meaning of their own, which are not stored under their names."""
POSITION = "pos"
"""The name of an axis whose places are rows of their own."""
WHOLE_MODULE = "module"
"""The name of the site that is the output or input of the module itself, whose path is empty."""


def expand_sites(module: nn.Module, given: Sequence[str], name: str) -> dict[str, tuple[str, str]]:
    """Name of each site -> its path with ':in' or the like, and the pattern that it was given by.

    Raises:
        UserError: no site, a pattern that matches no submodule, or a site that is named twice.
    """
    paths = [path for path, _ in module.named_modules()]
    found: dict[str, tuple[str, str]] = {}
    for pattern in given:
        if not isinstance(pattern, str):
            raise UserError(f"the site {pattern!r} of {name} is not text; give paths such as {paths[-1]!r}")
        path, colon, which = pattern.partition(":")
        matches = [known for known in paths if bool(known) == bool(path) and _pattern(path).fullmatch(known)]
        if not matches:
            near = difflib.get_close_matches(path.replace("*", "0"), paths, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(paths[1:6])}"
            raise UserError(f"the site {pattern!r} matches no module of {name}; {hint}")
        for match in matches:
            site = (match or WHOLE_MODULE) + colon + which
            if site in found:
                raise UserError(f"the site {site} of {name} is named twice; name it once")
            if not is_site_name(site):
                raise UserError(
                    f"the site {site!r} of {name} has characters that a cache does not take; rename the "
                    "module to ASCII letters, digits, '.', '_' and '-'"
                )
            found[site] = (match + colon + which, pattern)
    if not found:
        raise UserError(f"no site of {name} was named; pass sites, for example sites=[{paths[-1]!r}]")
    return found


def _pattern(path: str) -> re.Pattern[str]:
    return re.compile("[^.]*".join(map(re.escape, path.split("*"))))


def check_axes(axes: Mapping[str, Sequence[str]], given: Sequence[str]) -> None:
    """Raise a UserError unless ``axes`` names the axes of sites in ``given``, each axis by its own name."""
    if unknown := set(axes) - set(given):
        raise UserError(f"axes names {min(unknown)!r}, which is not in sites ({', '.join(given)})")
    for site, names in axes.items():
        plain = not isinstance(names, str) and all(isinstance(n, str) and is_plain_name(n) for n in names)
        others = [name for name in names if name != POSITION]
        if not plain or len(set(others)) != len(others):
            raise UserError(
                f"axes of {site!r} is {names!r}; give a tuple with one name for each axis after the first, "
                "such as ('pos', 'head', 'd_head'), and no name twice but 'pos'"
            )


def run_module(module: Any, batch: Any) -> object:
    """The default ``forward``: a tensor is the argument, a mapping has the keyword arguments."""
    if isinstance(batch, Tensor):
        return module(batch)
    if isinstance(batch, Mapping):
        return module(**batch)
    raise UserError(
        f"a batch is a {type(batch).__name__}, not a tensor or a mapping of keyword arguments; pass forward, "
        "such as forward=lambda module, batch: module(batch[0])"
    )


def move(batch: Any, device: torch.device) -> Any:
    """A copy of ``batch`` with its tensors on ``device``: a module may change what it is given in place."""
    if isinstance(batch, Tensor):
        return batch.to(device, copy=True)
    if isinstance(batch, np.ndarray):
        return batch.copy()
    if isinstance(batch, MutableMapping):  # a dict, or BatchEncoding of transformers
        moved = copy.copy(batch)
        for name, value in batch.items():
            moved[name] = move(value, device)
        return moved
    if isinstance(batch, list | tuple):
        items = [move(value, device) for value in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


def signature(batch: Any) -> str | None:
    """Types and shapes of a batch of tensors; None for a batch that holds anything else."""
    if isinstance(batch, Tensor | np.ndarray):
        return f"{type(batch).__name__}{tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        batch = [part for name in batch for part in (name, batch[name])]
    if isinstance(batch, str):
        return batch
    if isinstance(batch, list | tuple):
        parts = [signature(part) for part in batch]
        return None if None in parts else f"[{' '.join(map(str, parts))}]"
    return None


def batch_hash(batch: Any) -> str:
    """SHA-256 of the numbers and texts of a batch."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor | np.ndarray):
            tensor = torch.as_tensor(value)
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
        elif isinstance(value, Mapping):
            for name in value:
                digest.update(str(name).encode())
                add(value[name])
        elif isinstance(value, list | tuple):
            for part in value:
                add(part)
        elif isinstance(value, str | int | float | bytes):
            digest.update(repr(value).encode())

    add(batch)
    return digest.hexdigest()


def state_hash(module: nn.Module) -> str:
    """SHA-256 of the names and values of the parameters and persistent buffers of a module."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class UserColumn:
    """A column that the user gives: one value for each unit, or one for each row."""

    dtype: str
    per_unit: bool


def read_columns(
    given: Any, n_units: int, n_positions: int, known: Mapping[str, UserColumn] | None
) -> tuple[dict[str, UserColumn], dict[str, Tensor]]:
    """The columns that ``columns(batch)`` returned: what they are, and their values.

    A column of as many values as there are units has one for each unit; ``known`` are the columns of the
    first batch, which those of all others must be.

    Raises:
        UserError: not a mapping, a name that is not plain, other names than before, values that are not
            numbers, or too many or too few of them.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"columns(batch) is a {type(given).__name__}; it must be a dict of arrays")
    if known is not None and set(given) != set(known):
        raise UserError(
            f"columns(batch) has {', '.join(sorted(given))} but the first batch had "
            f"{', '.join(sorted(known))}; give every batch the same columns"
        )
    kinds, values = {}, {}
    n_rows = n_units * n_positions
    for name, value in given.items():
        if not isinstance(name, str) or not is_plain_name(name):
            raise UserError(
                f"{name!r} is not a valid name of a column; use letters, digits, '.', '_' and '-'"
            )
        values[name], dtype = _plain_column(name, value)
        per_unit = len(values[name]) == n_units if known is None else known[name].per_unit
        wanted = n_units if per_unit else n_rows
        if len(values[name]) != wanted and per_unit and len(values[name]) == n_rows:
            raise UserError(
                f"the column {name} has one value per row here, but in the first batch, of one position per "
                "unit, it was read as one per unit; begin with a batch of several positions"
            )
        if len(values[name]) != wanted:
            raise UserError(
                f"the column {name} has {len(values[name])} values for a batch of {n_units} units and "
                f"{n_rows} rows; give one for each unit or one for each row"
            )
        if name in RESERVED_COLUMNS and dtype != "bool":
            raise UserError(f"the column {name} holds {dtype}; it must hold booleans")
        if known is not None and dtype != known[name].dtype:
            raise UserError(
                f"the column {name} holds {dtype} but {known[name].dtype} in the first batch; "
                "give it one type"
            )
        kinds[name] = UserColumn(dtype, per_unit)
    return kinds, values


def _range(column: Tensor) -> tuple[int, ...]:
    """The smallest and the largest of integers [n]; torch has neither of unsigned ones."""
    array = column.numpy()
    return (int(array.min()), int(array.max())) if len(array) else ()


def _plain_column(name: str, value: Any) -> tuple[Tensor, str]:
    """The values [n] as a tensor, and the type to store them in."""
    try:
        column = torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise UserError(
            f"the column {name} does not hold numbers; give integers, floats or booleans"
        ) from None
    if column.ndim != 1:
        raise UserError(f"the column {name} has shape {list(column.shape)}; it must have one axis")
    if column.dtype is torch.bool:
        return column, "bool"
    if column.is_floating_point():
        if not column.isfinite().all():
            raise UserError(f"the column {name} holds NaN or infinity; give finite numbers")
        return column.to(torch.float32), "fp32"
    if column.is_complex():
        raise UserError(f"the column {name} holds complex numbers; give integers, floats or booleans")
    if any(not -(2**31) <= number < 2**31 for number in _range(column)):
        raise UserError(f"the column {name} holds numbers beyond 32 bits; give smaller ones, or floats")
    return column.to(torch.int32), "int32"
