"""The manifest of an activation cache: its columns and files, with sizes and checksums.

manifest.json is written last, so a directory that has one is complete. It holds no times, and no paths except
the names that the user gave, so that equal harvests make equal bytes:

    format           "saebench activation cache"
    format_version   1
    kind             "harvest" or "import"
    n_rows           rows of every column with one row per token
    n_contexts       rows of context_tokens and context_len; 0 for an import
    shard_rows       rows of every shard except the last one of a column
    hooks            hook names, in the order in which they were given
    columns          name -> dtype, row_shape, shards [{rows, sha256}]
    files            other files, name -> bytes, sha256
    made_from        settings, model and text that it was made from; see harvest.py and importing.py
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saebench.activations.shards import TORCH_DTYPES
from saebench.core.errors import UserError
from saebench.core.files import read_json

MANIFEST_NAME = "manifest.json"
FORMAT = "saebench activation cache"
FORMAT_VERSION = 1

HOOK_PREFIX = "hook/"
GRADIENT_PREFIX = "gradient/"
TOKEN_COLUMNS = ("token", "doc", "ctx", "pos")
CONTEXT_COLUMNS = ("context_tokens", "context_len")
VOCAB_FILE = "vocab.safetensors"
LABELS_FILE = "doc_labels.json"


def gradient_dtype(dtype: str) -> str:
    """The type in which gradients are stored when activations have ``dtype``.

    It is the same type, except bf16 for fp16: gradients per token are small and differ by orders of
    magnitude, and most would be below 6e-8, the smallest fp16 number.
    """
    return "bf16" if dtype == "fp16" else dtype


@dataclass(frozen=True)
class Shard:
    rows: int
    sha256: str


@dataclass(frozen=True)
class ColumnType:
    """Type of a column: ``dtype`` is one of shards.TORCH_DTYPES, ``row_shape`` the shape of one row."""

    dtype: str
    row_shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class CacheColumn:
    type: ColumnType
    shards: tuple[Shard, ...]

    @property
    def n_rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        return {
            "dtype": self.type.dtype,
            "row_shape": list(self.type.row_shape),
            "shards": [asdict(shard) for shard in self.shards],
        }


@dataclass(frozen=True)
class CacheManifest:
    """A validated manifest; ``raw`` is its JSON."""

    raw: dict[str, Any]
    kind: str
    n_rows: int
    n_contexts: int
    shard_rows: int
    hooks: tuple[str, ...]
    columns: dict[str, CacheColumn]
    files: dict[str, tuple[int, str]]


def read_cache_manifest(cache: Path) -> CacheManifest:
    """Read and validate the manifest of the cache in directory ``cache``; reads no other file.

    Raises:
        UserError: no cache there, or one that is unfinished, damaged or of a newer format.
    """
    path = cache / MANIFEST_NAME
    if not path.exists():
        if not cache.exists():
            raise UserError(
                f"the activation cache {cache} does not exist; check the path, or run saebench harvest"
            )
        if (cache / "journal.json").exists():
            raise UserError(
                f"the activation cache {cache} is unfinished; run its harvest or import again to complete it"
            )
        raise UserError(f"{cache} is not an activation cache: it has no {MANIFEST_NAME}; check the path")
    raw = read_json(path, what="the cache manifest")
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f"{path} is not the manifest of an activation cache; check the path")
    version = raw.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"{cache} has format {version} but this saebench reads up to {FORMAT_VERSION}; update saebench"
        )
    if version != FORMAT_VERSION:
        raise UserError(f"{path} is damaged (format_version is {version!r}); make the cache again")
    try:
        manifest = _parse(raw)
        problem = _contradiction(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"{type(error).__name__} {error}"
    if problem:
        raise UserError(f"{path} is damaged ({problem}); restore it or make the cache again")
    return manifest


def _parse(raw: dict[str, Any]) -> CacheManifest:
    columns = {}
    for name, value in raw["columns"].items():
        shards = tuple(Shard(_count(shard["rows"]), str(shard["sha256"])) for shard in value["shards"])
        shape = tuple(_count(size) for size in value["row_shape"])
        columns[name] = CacheColumn(ColumnType(value["dtype"], shape), shards)
    return CacheManifest(
        raw=raw,
        kind=raw["kind"],
        n_rows=_count(raw["n_rows"]),
        n_contexts=_count(raw["n_contexts"]),
        shard_rows=_count(raw["shard_rows"]),
        hooks=tuple(raw["hooks"]),
        columns=columns,
        files={name: (_count(value["bytes"]), str(value["sha256"])) for name, value in raw["files"].items()},
    )


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _contradiction(manifest: CacheManifest) -> str | None:
    """What is inconsistent in the manifest, or None."""
    if manifest.kind not in ("harvest", "import"):
        return f"kind is {manifest.kind!r}"
    needed = [HOOK_PREFIX + hook for hook in manifest.hooks] + ["held_out"]
    if manifest.kind == "harvest":
        needed += [*TOKEN_COLUMNS, *CONTEXT_COLUMNS]
        missing_files = {VOCAB_FILE} - set(manifest.files)
        if missing_files:
            return f"it has no entry for the file {missing_files.pop()}"
    if not manifest.hooks or manifest.n_rows < 1:
        return "it has no rows"
    for name in needed:
        if name not in manifest.columns:
            return f"it has no column {name}"
    for name in [*manifest.columns, *manifest.files]:
        if not is_plain_name(name.removeprefix(HOOK_PREFIX).removeprefix(GRADIENT_PREFIX)):
            return f"{name!r} is not a valid name"
    for name, column in manifest.columns.items():
        if column.type.dtype not in TORCH_DTYPES:
            return f"column {name} has type {column.type.dtype!r}"
        rows = manifest.n_contexts if name in CONTEXT_COLUMNS else manifest.n_rows
        if column.n_rows != rows:
            return f"column {name} has {column.n_rows} rows instead of {rows}"
        if any(shard.rows != manifest.shard_rows for shard in column.shards[:-1]):
            return f"column {name} has shards of unequal size"
        if name.startswith(GRADIENT_PREFIX):
            hook = manifest.columns.get(HOOK_PREFIX + name.removeprefix(GRADIENT_PREFIX))
            if hook is None or hook.type.row_shape != column.type.row_shape:
                return f"column {name} does not match an activation column"
    facts = {"settings", "model"} if manifest.kind == "harvest" else {"settings"}
    made_from = manifest.raw["made_from"]
    if not all(isinstance(made_from[fact], dict) for fact in facts):
        return "made_from has no settings or no model"
    return None


def is_plain_name(name: str) -> bool:
    """True for names that are safe as file names inside the cache; hook names are."""
    return bool(name) and name.isascii() and name[0] != "." and all(c.isalnum() or c in "._-" for c in name)
