"""import_activations: make a cache of an existing array, a .npy or a .safetensors file with one tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from saebench.activations.cache import ActivationCache, open_cache
from saebench.activations.manifest import (
    GRADIENT_PREFIX,
    HOOK_PREFIX,
    gradient_dtype,
    is_plain_name,
)
from saebench.activations.settings import ImportConfig
from saebench.activations.shards import DATA_START, TORCH_DTYPES, row_bytes
from saebench.activations.writer import CacheWriter, inspect_target
from saebench.activations.writing import warn_of_diagnosis
from saebench.core.errors import UserError
from saebench.core.files import directory_lock, require_disk, sha256_file
from saebench.core.progress import progress
from saebench.core.settings import accepts_settings
from saebench.sources.base import ColumnType, Site
from saebench.sources.modality import UNIT

HELD_OUT_SHARE = 20
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class _Source:
    """An array [n_rows, d_in] in the file ``path``; ``read(start, end)`` returns rows start to end - 1."""

    path: Path
    n_rows: int
    d_in: int
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]

    def pieces(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """Ranges [first, end) of rows from ``start`` on, of a few MiB each."""
        step = max(1, _CHUNK_BYTES // (self.d_in * self.dtype.itemsize))
        for first in range(start, self.n_rows, step):
            yield first, min(first + step, self.n_rows)


@accepts_settings(ImportConfig)
def import_activations(config: ImportConfig) -> ActivationCache:
    """Make an activation cache of the array in ``config.source``, [n, d_in], reading it in pieces.

    The last 5% of the rows are held out (at least one row, if there are two). The cache has neither tokens
    nor contexts. ``config.gradients`` [n, d_in] holds the gradient of each row. After an import was killed,
    the same call resumes it.

    >>> import numpy as np
    >>> np.save("x.npy", np.random.default_rng(0).normal(size=(100, 8)).astype("float32"))
    >>> sb.import_activations(source="x.npy", out="imported", quiet=True).activations().shape
    torch.Size([100, 8])

    Raises:
        UserError: a file is not such an array, the gradients and the activations have different shapes, an
            array holds NaN or infinite values (also after conversion to ``dtype``), the disk is full, or
            ``out`` holds something else.
    """
    if not is_plain_name(config.hook):
        raise UserError(
            f"--site {config.hook!r} is not a valid hook name; use letters, digits, '.', '_' and '-'"
        )
    source = _open(config.source)
    sources = {HOOK_PREFIX + config.hook: source}
    dtype = config.dtype or _own_dtype(source.dtype)
    identity = {
        "source": {"name": config.source.name, "sha256": sha256_file(config.source)},
        "settings": {"hook": config.hook, "dtype": dtype, "shard_rows": config.shard_rows},
    }
    types = {HOOK_PREFIX + config.hook: ColumnType(dtype, (source.d_in,))}
    if config.gradients is not None:
        sources[GRADIENT_PREFIX + config.hook] = _open_gradients(config.gradients, source)
        types[GRADIENT_PREFIX + config.hook] = ColumnType(gradient_dtype(dtype), (source.d_in,))
        identity["gradients"] = {"name": config.gradients.name, "sha256": sha256_file(config.gradients)}
    if inspect_target(config.out, identity) == "complete":
        return open_cache(config.out)
    for name, array in sources.items():
        _require_finite(array, TORCH_DTYPES[types[name].dtype])
    columns = {**types, "held_out": ColumnType("bool")}
    n_bytes = source.n_rows * (sum(row_bytes(t.dtype, t.row_shape) for t in types.values()) + 1)
    require_disk(config.out, n_bytes + 4 * DATA_START, what="the activation cache")
    with directory_lock(config.out, what="the activation cache"):
        inspect_target(config.out, identity)
        with CacheWriter(
            config.out,
            kind="import",
            sites={config.hook: Site(config.hook, (("d", source.d_in),), dtype, "array")},
            modality=UNIT.name,
            columns=columns,
            shard_rows=config.shard_rows,
            identity=identity,
        ) as writer:
            _copy(sources, types, writer, quiet=config.quiet)
            writer.finish({})
    return warn_of_diagnosis(open_cache(config.out))


def _copy(
    sources: Mapping[str, _Source], types: Mapping[str, ColumnType], writer: CacheWriter, *, quiet: bool
) -> None:
    first_source = next(iter(sources.values()))
    n_rows = first_source.n_rows
    held_out_from = n_rows - max(n_rows // HELD_OUT_SHARE, int(n_rows > 1))
    start = writer.rows.keeps
    writer.rows.skip(start)
    with progress("import", total=n_rows, unit="row", initial=start, quiet=quiet) as bar:
        for first, end in first_source.pieces(start):
            rows = {
                name: source.read(first, end).to(TORCH_DTYPES[types[name].dtype])
                for name, source in sources.items()
            }
            rows["held_out"] = torch.arange(first, end) >= held_out_from
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
    seen, wanted = (gradients.n_rows, gradients.d_in), (activations.n_rows, activations.d_in)
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
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; give a .npy or .safetensors file")
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
    except (ValueError, OSError, EOFError) as error:
        raise UserError(
            f"{path} is not an array that can be read ({error}); save it with numpy.save"
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
    return _Source(path, array.shape[0], array.shape[1], dtype, read)


def _open_safetensors(path: Path) -> _Source:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            tensors = {name: file.get_slice(name) for name in names}
            shapes = {name: tuple(piece.get_shape()) for name, piece in tensors.items()}
            dtypes = {name: piece.get_dtype() for name, piece in tensors.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}); save it again") from None
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

    return _Source(path, shapes[name][0], shapes[name][1], known[dtypes[name]], read)


def _require_rows(path: Path, shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or 0 in shape:
        raise UserError(
            f"{path} has shape {list(shape)}; an import needs an array [n, d_in] with at least one row"
        )
