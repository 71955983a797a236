"""import_activations: make a cache of existing arrays, .npy or .safetensors files with one tensor each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saebench.activations.cache import ActivationCache, open_cache
from saebench.activations.import_registry import IMPORT_FORMATS
from saebench.activations.manifest import (
    GRADIENT_PREFIX,
    HOOK_PREFIX,
    gradient_dtype,
    is_site_name,
)
from saebench.activations.settings import ImportConfig
from saebench.activations.shards import DATA_START, TORCH_DTYPES, row_bytes
from saebench.activations.writer import CacheWriter, inspect_target
from saebench.activations.writing import warn_of_diagnosis
from saebench.core.errors import UserError
from saebench.core.files import directory_lock, require_disk, sha256_file
from saebench.core.progress import progress
from saebench.core.reading import require_file, shown
from saebench.core.settings import accepts_settings
from saebench.sources.base import ColumnType, Site
from saebench.sources.modality import UNIT

HELD_OUT_SHARE = 20
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class _Source:
    """An array [n_units, d_in] or [n_units, n_positions, d_in] in the file ``path``.

    Its rows are the n_units * n_positions vectors. ``read_units(start, end)`` returns units start to end - 1.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    read_units: Callable[[int, int], Tensor]

    @property
    def d_in(self) -> int:
        return self.shape[-1]

    @property
    def n_positions(self) -> int:
        return math.prod(self.shape[1:-1])

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape[:-1])

    def read(self, start: int, end: int) -> Tensor:
        """Rows start to end - 1, [end - start, d_in]."""
        first = start // self.n_positions
        units = self.read_units(first, -(-end // self.n_positions))
        return units.reshape(-1, self.d_in)[start - first * self.n_positions :][: end - start]

    def pieces(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """Ranges [first, end) of rows from ``start`` on, of a few MiB each."""
        step = max(1, _CHUNK_BYTES // (self.d_in * self.dtype.itemsize))
        for first in range(start, self.n_rows, step):
            yield first, min(first + step, self.n_rows)


@accepts_settings(ImportConfig)
def import_activations(config: ImportConfig) -> ActivationCache:
    """Make an activation cache of the array in ``config.source``, [n, d_in], reading it in pieces.

    An array [n, t, d_in] has n units of t rows each, and the cache has columns unit and pos. The last 5% of
    the units are held out (at least one, if there are two). Several arrays with the same rows are the sites
    of one cache. The cache has no tokens. ``config.gradients`` has the gradient of each row. After an import
    was killed, the same call resumes it.

    With ``format="vllm"`` the source is a directory of hidden states that vLLM has written, one file per
    request, and the result is the cache of a text (saebench/activations/vllm.py).

    >>> import numpy as np
    >>> np.save("x.npy", np.random.default_rng(0).normal(size=(100, 8)).astype("float32"))
    >>> sb.import_activations(source="x.npy", out="imported", quiet=True).activations().shape
    torch.Size([100, 8])

    Raises:
        UserError: a file is not such an array, the gradients and the activations have different shapes, an
            array holds NaN or infinite values (also after conversion to ``dtype``), the disk is full, or
            ``out`` holds something else.
    """
    if config.format != "array":
        cache: ActivationCache = IMPORT_FORMATS.load(config.format)(config)
        return cache
    for hook in config.hook:
        if not is_site_name(hook):
            raise UserError(
                f"--site {hook!r} is not a valid hook name; use letters, digits, '.', '_', '-' and ':'"
            )
    paths = [config.source, *config.also]
    arrays = {hook: _open(path) for hook, path in zip(config.hook, paths, strict=True)}
    first = arrays[config.hook[0]]
    for array in arrays.values():
        if array.shape[:-1] != first.shape[:-1]:
            raise UserError(
                f"{array.path} has shape {list(array.shape)} but {first.path} has {list(first.shape)}; the "
                "sites of one cache must have the same rows"
            )
    dtypes = {hook: config.dtype or _own_dtype(array.dtype) for hook, array in arrays.items()}
    sources = {HOOK_PREFIX + hook: array for hook, array in arrays.items()}
    types = {HOOK_PREFIX + hook: ColumnType(dtypes[hook], (array.d_in,)) for hook, array in arrays.items()}
    described = [{"name": path.name, "sha256": sha256_file(path)} for path in paths]
    identity: dict[str, Any] = {
        **({"source": described[0]} if len(paths) == 1 else {"sources": described}),
        "settings": {
            "hook": _one_or_list(config.hook),
            "dtype": _one_or_list(list(dtypes.values())),
            "shard_rows": config.shard_rows,
        },
    }
    if config.gradients is not None:
        name = GRADIENT_PREFIX + config.hook[0]
        sources[name] = _open_gradients(config.gradients, first)
        types[name] = ColumnType(gradient_dtype(dtypes[config.hook[0]]), (first.d_in,))
        identity["gradients"] = {"name": config.gradients.name, "sha256": sha256_file(config.gradients)}
    if inspect_target(config.out, identity) == "complete":
        return open_cache(config.out)
    for name, array in sources.items():
        _require_finite(array, TORCH_DTYPES[types[name].dtype])
    columns = {**types, "held_out": ColumnType("bool")}
    if len(first.shape) > 2:
        columns |= dict.fromkeys((*UNIT.row_columns, *UNIT.unit_columns), ColumnType("int32"))
    n_bytes = first.n_rows * (sum(row_bytes(t.dtype, t.row_shape) for t in types.values()) + 9)
    require_disk(config.out, n_bytes + 4 * DATA_START, what="the activation cache")
    with directory_lock(config.out, what="the activation cache"):
        if inspect_target(config.out, identity) == "complete":  # by another process, in the meantime
            return open_cache(config.out)
        with CacheWriter(
            config.out,
            kind="import",
            sites={
                hook: Site(hook, (("d", array.d_in),), dtypes[hook], "array")
                for hook, array in arrays.items()
            },
            modality=UNIT.name,
            columns=columns,
            shard_rows=config.shard_rows,
            identity=identity,
        ) as writer:
            _copy(sources, columns, writer, quiet=config.quiet)
            writer.finish({})
    return warn_of_diagnosis(open_cache(config.out))


def _one_or_list(values: Sequence[str]) -> str | list[str]:
    return values[0] if len(values) == 1 else list(values)


def _copy(
    sources: Mapping[str, _Source], columns: Mapping[str, ColumnType], writer: CacheWriter, *, quiet: bool
) -> None:
    array = next(iter(sources.values()))
    n_units, n_positions, n_rows = array.shape[0], array.n_positions, array.n_rows
    held_out_from = n_units - max(n_units // HELD_OUT_SHARE, int(n_units > 1))
    if UNIT.length_column in columns:
        writer.contexts.append({UNIT.length_column: torch.full((n_units,), n_positions, dtype=torch.int32)})
    start = writer.rows.keeps
    writer.rows.skip(start)
    with progress("import", total=n_rows, unit="row", initial=start, quiet=quiet) as bar:
        for first, end in array.pieces(start):
            row_N = torch.arange(first, end)
            unit_N = row_N // n_positions
            rows = {
                name: source.read(first, end).to(TORCH_DTYPES[columns[name].dtype])
                for name, source in sources.items()
            }
            rows["held_out"] = unit_N >= held_out_from
            if UNIT.length_column in columns:
                rows[UNIT.unit_column] = unit_N.to(torch.int32)
                rows[UNIT.position_column] = (row_N % n_positions).to(torch.int32)
            writer.rows.append(rows)
            bar.update(end - first)


def _require_finite(source: _Source, dtype: torch.dtype) -> None:
    """Check all values before anything is written."""
    for first, end in source.pieces():
        rows_ND = source.read(first, end)
        stored_ND = rows_ND.to(dtype)
        bad_N = ~torch.isfinite(stored_ND).all(dim=1)
        if not bad_N.any():
            continue
        row = int(bad_N.nonzero()[0])
        column = int((~torch.isfinite(stored_ND[row])).nonzero()[0])
        value = float(rows_ND[row, column])
        where = f"{source.path}: row {first + row}"
        if math.isfinite(value):
            name = str(dtype).removeprefix("torch.")
            way_out = "scale the array down first" if dtype is torch.float32 else "pass --dtype fp32"
            raise UserError(f"{where} holds {value:.6g}, too large for {name}; {way_out}")
        raise UserError(f"{where}, column {column} is {value}; remove rows with such values before importing")


def _open_gradients(path: Path, activations: _Source) -> _Source:
    gradients = _open(path)
    seen, wanted = gradients.shape, activations.shape
    if seen != wanted:
        raise UserError(
            f"--gradients {path} has shape {list(seen)} but {activations.path} has {list(wanted)}; "
            "give one gradient for each row, in the same order"
        )
    return gradients


def _own_dtype(dtype: torch.dtype) -> str:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    return names.get(dtype, "fp32")


def _open(path: Path) -> _Source:
    require_file(path, what="the array", way_out="give a .npy or .safetensors file")
    if path.suffix == ".npy":
        source = _open_npy(path)
    elif path.suffix == ".safetensors":
        source = _open_safetensors(path)
    else:
        raise UserError(f"{path} is neither a .npy nor a .safetensors file; save the array as one of them")
    return source


def _open_npy(path: Path) -> _Source:
    import numpy as np

    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy evaluates the header as a literal, which raises many kinds
        reason = shown(f"{type(error).__name__}: {error}", 200)
        raise UserError(
            f"{path} is not an array that can be read ({reason}); save it with numpy.save"
        ) from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} is an archive of several arrays; save one array with numpy.save")
    if array.dtype.kind != "f" or array.dtype.itemsize not in (2, 4, 8):
        raise UserError(f"{path} holds values of type {array.dtype}; convert them to float32 first")
    _require_rows(path, array.shape)

    def read(start: int, end: int) -> Tensor:
        native = array.dtype.newbyteorder("=")
        return torch.from_numpy(np.array(array[start:end], dtype=native, order="C"))

    dtype = {2: torch.float16, 4: torch.float32, 8: torch.float64}[array.dtype.itemsize]
    return _Source(path, array.shape, dtype, read)


def _open_safetensors(path: Path) -> _Source:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            tensors = {name: file.get_slice(name) for name in names}
            shapes = {name: tuple(piece.get_shape()) for name, piece in tensors.items()}
            dtypes = {name: piece.get_dtype() for name, piece in tensors.items()}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        reason = shown(str(error), 200)
        raise UserError(f"{path} is not a readable safetensors file ({reason}); save it again") from None
    if len(names) != 1:
        found = ", ".join(names[:5])
        raise UserError(f"{path} holds {len(names)} tensors ({found}); save a file with one [n, d_in] tensor")
    (name,) = names
    known = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if dtypes[name] not in known:
        raise UserError(f"{path} holds values of type {dtypes[name]}; convert them to float32 first")
    _require_rows(path, shapes[name])

    def read(start: int, end: int) -> Tensor:
        with safe_open(path, framework="pt") as file:
            rows: Tensor = file.get_slice(name)[start:end]
            return rows

    return _Source(path, shapes[name], known[dtypes[name]], read)


def _require_rows(path: Path, shape: tuple[int, ...]) -> None:
    if len(shape) not in (2, 3) or 0 in shape:
        raise UserError(
            f"{path} has shape {list(shape)}; an import needs an array [n, d_in] or [n, t, d_in] with at "
            "least one row"
        )
