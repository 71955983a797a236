"""The manifest of an activation cache: its columns and files, with sizes and checksums.

manifest.json is written last, so a directory that has one is complete. It holds no times, and no paths except
the names that the user gave, so that equal harvests make equal bytes:

    format           "saebench activation cache"
    format_version   1 or 2; a writer uses 1 for what format 1 can say
    kind             "harvest" or "import"
    modality         format 2: "text", "unit", ...; see saebench/sources/modality.py
    sites            format 2: name -> axes [[name, size], ...], dtype, path
    n_rows           rows of every column with one row per token
    n_contexts       rows of the unit columns (of a text: context_tokens, context_len); 0 without units
    shard_rows       rows of every shard except the last one of a column
    hooks            names of the sites, in the order in which they were given
    columns          name -> dtype, row_shape, shards [{rows, sha256}]
    files            other files, name -> bytes, sha256
    block_checksums  algorithm ("xxh3-64"), bytes of a block, columns: name -> a string for each shard. The
                     hash of a cache leaves it out; caches of saebench 0.1 lack it
    diagnosis        norms, variance and documents; see diagnosis.py. The hash of a cache leaves it out
    made_from        settings, model and text that it was made from; see the sources
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from saebench.activations.diagnosis import NORMS
from saebench.activations.shards import BLOCK_ALGORITHM, BLOCK_BYTES, SUM_DIGITS, TORCH_DTYPES, row_bytes
from saebench.core.errors import UserError
from saebench.core.files import sha256_json
from saebench.core.heads import head_of
from saebench.core.reading import check_shape, read_json
from saebench.core.shapes import Count, ModelFacts, Name, Number, Positive, Sha256, Shape, Text
from saebench.sources.base import ColumnType, Site, SitePath
from saebench.sources.modality import TEXT, UNIT, Modality, modality
from saebench.sources.model_identity import IDENTITY

MANIFEST_NAME = "manifest.json"
_WAY_OUT = "restore it or make the cache again"
FORMAT = "saebench activation cache"
FORMAT_VERSION = 2
_FOLLOWS = ("diagnosis", "block_checksums")
"""Keys whose values follow from the files of the cache."""

HOOK_PREFIX = "hook/"
GRADIENT_PREFIX = "gradient/"
ROW_PREFIX = "row_column/"
"""Before the name of a column of the user's with one value per row."""
UNIT_PREFIX = "unit_column/"
"""Before the name of a column of the user's with one value per unit."""
VOCAB_FILE = "vocab.safetensors"
LABELS_FILE = "doc_labels.json"


def gradient_dtype(dtype: str) -> str:
    """The type in which gradients are stored when activations have ``dtype``.

    It is the same type, except bf16 for fp16: gradients per token are small and differ by orders of
    magnitude, and most would be below 6e-8, the smallest fp16 number.
    """
    return "bf16" if dtype == "fp16" else dtype


class _Shard(Shape):
    rows: Count
    sha256: Sha256


class _Column(Shape):
    dtype: Text
    row_shape: list[Positive]
    shards: list[_Shard]


class _File(Shape):
    bytes: Count
    sha256: Sha256


class _Site(Shape):
    axes: list[list[Name | Positive]]
    dtype: Text
    path: SitePath | None


class _Text(Shape):
    name: Text | None = None


class _MadeFrom(Shape):
    settings: dict[str, Any]
    model: ModelFacts | None = None
    models: list[ModelFacts] = Field(default_factory=list)
    module: dict[str, Any] | None = None
    text: _Text | None = None


class _SiteDiagnosis(Shape):
    norm: dict[str, Number | None]
    top_rows: Number | None
    top_dimension: Number | None
    top_10_dimensions: Number | None
    fvu_floor: Number | None


class _Diagnosis(Shape):
    sites: dict[str, _SiteDiagnosis]
    sample_rows: dict[str, Count]
    held_out_rows: Number
    n_documents: Count = 0
    held_out_documents: Number = 0


class _BlockChecksums(Shape):
    algorithm: Text
    bytes: Positive
    columns: dict[str, list[Annotated[str, Field(pattern="^[0-9a-f]*$")]]]


class _MaxNorm(Shape):
    limit: dict[str, Number]


class _Manifest(Shape):
    """What manifest.json must have; how its values must agree is checked by `_contradiction`."""

    kind: Literal["harvest", "import"]
    n_rows: Positive
    n_contexts: Count
    shard_rows: Positive
    hooks: list[Name]
    columns: dict[str, _Column]
    files: dict[str, _File]
    made_from: _MadeFrom
    modality: Name = ""
    sites: dict[str, _Site] = Field(default_factory=dict)
    block_checksums: _BlockChecksums | None = None
    diagnosis: _Diagnosis | None = None
    left_out: dict[str, Count] = Field(default_factory=dict)
    max_norm: _MaxNorm | None = None


@dataclass(frozen=True)
class Shard:
    """``blocks`` are the checksums of its blocks, see `Sums`; None in a cache that has none."""

    rows: int
    sha256: str
    blocks: str | None = None


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
            "shards": [{"rows": shard.rows, "sha256": shard.sha256} for shard in self.shards],
        }


@dataclass(frozen=True)
class CacheManifest:
    """A validated manifest; ``raw`` is its JSON."""

    raw: dict[str, Any]
    kind: str
    n_rows: int
    n_contexts: int
    shard_rows: int
    modality: Modality
    sites: dict[str, Site]
    columns: dict[str, CacheColumn]
    files: dict[str, tuple[int, str]]

    @property
    def hash(self) -> str:
        """SHA-256 of the manifest's content, which holds the checksum of every file.

        The diagnosis and the checksums of blocks follow from the files and are left out, so that caches of
        equal files have equal hashes whichever version wrote them. So is the ``identity`` of a model beside
        its ``hash``: a cache has the hash that version 0.1 gives it.
        """
        content = {name: value for name, value in self.raw.items() if name not in _FOLLOWS}
        made_from = dict(content["made_from"])
        if isinstance(made_from.get("model"), dict):
            made_from["model"] = _without_identity(made_from["model"])
        if isinstance(made_from.get("models"), list):
            made_from["models"] = [_without_identity(model) for model in made_from["models"]]
        return sha256_json({**content, "made_from": made_from})


def _without_identity(model: Any) -> Any:
    return {k: v for k, v in model.items() if k != IDENTITY} if isinstance(model, dict) else model


def block_checksums(columns: Mapping[str, CacheColumn]) -> dict[str, Any]:
    """The value of ``block_checksums`` in a manifest."""
    sums = {name: [shard.blocks for shard in column.shards] for name, column in columns.items()}
    return {"algorithm": BLOCK_ALGORITHM, "bytes": BLOCK_BYTES, "columns": sums}


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
    if type(version) is not int or version < 1:
        raise UserError(f"{path} is damaged (format_version is {version!r:.60}); make the cache again")
    check_shape(raw, _Manifest, source=f"the cache manifest {path}", way_out=_WAY_OUT)
    try:
        manifest = _parse(raw)
        problem = _contradiction(manifest)
    except ValueError as error:
        problem = str(error)
    if problem:
        raise UserError(f"{path} is damaged ({problem}); {_WAY_OUT}")
    return manifest


def _blocks(raw: dict[str, Any]) -> Mapping[str, list[str | None]]:
    """The checksums of blocks by column and shard; empty without any that this version can compute."""
    blocks = raw.get("block_checksums") or {}
    known = blocks.get("algorithm") == BLOCK_ALGORITHM and blocks.get("bytes") == BLOCK_BYTES
    columns: Mapping[str, list[str | None]] = blocks["columns"] if known else {}
    return columns


def _parse(raw: dict[str, Any]) -> CacheManifest:
    columns = {}
    blocks = _blocks(raw)
    for name, value in raw["columns"].items():
        listed = value["shards"]
        sums = blocks.get(name, [None] * len(listed))
        if len(sums) != len(listed):
            raise ValueError(f"column {name} has checksums of the blocks of {len(sums)} shards")
        shards = tuple(
            Shard(shard["rows"], shard["sha256"], own) for shard, own in zip(listed, sums, strict=True)
        )
        columns[name] = CacheColumn(ColumnType(value["dtype"], tuple(value["row_shape"])), shards)
    return CacheManifest(
        raw=raw,
        kind=raw["kind"],
        n_rows=raw["n_rows"],
        n_contexts=raw["n_contexts"],
        shard_rows=raw["shard_rows"],
        modality=modality(raw["modality"] if "modality" in raw else _modality_of_format_1(raw)),
        sites=_sites(raw, columns),
        columns=columns,
        files={name: (value["bytes"], value["sha256"]) for name, value in raw["files"].items()},
    )


def _modality_of_format_1(raw: dict[str, Any]) -> str:
    return TEXT.name if raw["kind"] == "harvest" else UNIT.name


def _sites(raw: dict[str, Any], columns: Mapping[str, CacheColumn]) -> dict[str, Site]:
    """The sites of a manifest; format 1 says their widths only."""
    for hook in raw["hooks"]:
        if HOOK_PREFIX + hook not in columns:
            raise ValueError(f"it has no column {HOOK_PREFIX + hook}")
    if raw["format_version"] == 1:
        types = {hook: columns[HOOK_PREFIX + hook].type for hook in raw["hooks"]}
        if flat := next((hook for hook, kind in types.items() if len(kind.row_shape) != 1), None):
            raise ValueError(f"column {HOOK_PREFIX + flat} does not have rows of one axis")
        return {hook: Site(hook, (("d", kind.row_shape[0]),), kind.dtype) for hook, kind in types.items()}
    sites = {}
    for name in raw["hooks"]:
        described = raw.get("sites", {}).get(name)
        if described is None:
            raise ValueError(f"it does not describe the site {name}")
        if not all(list(map(type, axis)) == [str, int] for axis in described["axes"]):
            raise ValueError(f"the axes of the site {name} are not pairs of a name and a size")
        axes = tuple((axis, size) for axis, size in described["axes"])
        sites[name] = Site(name, axes, described["dtype"], described["path"])
    return sites


def head_of_manifest(
    kind: str, modality: str, sites: Mapping[str, Site], columns: Iterable[str], made_from: Mapping[str, Any]
) -> dict[str, Any]:
    """The first keys of a manifest, in the oldest format that can say them.

    Format 1 has texts that one model read, and arrays of vectors. It has neither native shapes of several
    axes nor names with a colon.
    """
    usual = {"harvest": TEXT, "import": UNIT}[kind]
    others = {name for name in columns if not name.startswith((HOOK_PREFIX, GRADIENT_PREFIX))} - {"held_out"}
    known = {*TEXT.row_columns, *TEXT.unit_columns} if kind == "harvest" else set()
    simple = all(len(site.axes) == 1 and is_plain_name(name) for name, site in sites.items())
    head = {"format": FORMAT, "format_version": 1, "kind": kind, "hooks": list(sites)}
    if simple and modality == usual.name and others == known and "models" not in made_from:
        return head
    described = {
        name: {"axes": [list(axis) for axis in site.axes], "dtype": site.dtype, "path": site.path}
        for name, site in sites.items()
    }
    return {**head, "format_version": 2, "modality": modality, "sites": described}


def is_unit_column(name: str, of: Modality) -> bool:
    """Whether a column has one entry per unit; all others have one per row."""
    return name in of.unit_columns or name.startswith(UNIT_PREFIX)


def column_folder(name: str) -> str:
    """The folder of a column: its name, with '%3A' for the colon, which not every file system takes."""
    return name.replace(":", "%3A")


def _contradiction(manifest: CacheManifest) -> str | None:
    """What is inconsistent in the manifest, or None."""
    if not manifest.sites:
        return "it has no site"
    needed = ["held_out"]
    of = manifest.modality
    if manifest.kind == "harvest" or manifest.n_contexts:
        needed += [*of.row_columns, *of.unit_columns]
        missing_files = set(of.files) - set(manifest.files)
        if missing_files:
            return f"it has no entry for the file {missing_files.pop()}"
    for name in needed:
        if name not in manifest.columns:
            return f"it has no column {name}"
    second = manifest.raw["format_version"] > 1
    for name in [*manifest.columns, *manifest.files]:
        plain = name.split("/", 1)[1] if name.startswith(_PREFIXES) else name
        plain = head_of(plain)[0] if name in manifest.columns else plain
        if not (is_site_name(plain) if second and name in manifest.columns else is_plain_name(plain)):
            return f"{name!r} is not a valid name"
    for name, site in manifest.sites.items():
        kind = manifest.columns[HOOK_PREFIX + name].type
        if kind.row_shape != (math.prod(site.shape),) or kind.dtype != site.dtype:
            return f"the site {name} is not what its column holds"
    for name, column in manifest.columns.items():
        if column.type.dtype not in TORCH_DTYPES:
            return f"column {name} has type {column.type.dtype!r}"
        rows = manifest.n_contexts if is_unit_column(name, of) else manifest.n_rows
        n_bytes = row_bytes(column.type.dtype, column.type.row_shape)
        for shard in column.shards:
            if shard.blocks is not None and len(shard.blocks) != SUM_DIGITS * -(
                -shard.rows * n_bytes // BLOCK_BYTES
            ):
                return f"column {name} has another number of blocks than of their checksums"
        if column.n_rows != rows:
            return f"column {name} has {column.n_rows} rows instead of {rows}"
        if any(shard.rows != manifest.shard_rows for shard in column.shards[:-1]):
            return f"column {name} has shards of unequal size"
        if name.startswith(GRADIENT_PREFIX):
            hook = manifest.columns.get(HOOK_PREFIX + name.removeprefix(GRADIENT_PREFIX))
            if hook is None or hook.type.row_shape != column.type.row_shape:
                return f"column {name} does not match an activation column"
    made_from = manifest.raw["made_from"]
    if manifest.kind == "harvest" and not second and made_from.get("model") is None:
        return "made_from has no model"
    if not _models_fit(manifest, len(made_from.get("models", []))):
        return "made_from does not have the models that sites name"
    if (diagnosis := manifest.raw.get("diagnosis")) is not None:
        for name in manifest.sites:
            found = diagnosis["sites"].get(name)
            if found is None or name not in diagnosis["sample_rows"] or not {*NORMS} <= set(found["norm"]):
                return f"its diagnosis lacks the site {name}"
    return None


def _models_fit(manifest: CacheManifest, n_models: int) -> bool:
    """Whether the sites of a cache of several models begin with the number of one."""
    if not n_models or manifest.raw["made_from"].get("model") is not None:
        return True
    numbers = (name.partition(":")[0] for name in manifest.sites)
    return all(number in map(str, range(n_models)) for number in numbers)


_PREFIXES = (HOOK_PREFIX, GRADIENT_PREFIX, ROW_PREFIX, UNIT_PREFIX)


def is_site_name(name: str) -> bool:
    """True for names of sites: those of hooks and modules, which may have colons (0:S, layers.3:in)."""
    return name[:1] != ":" and is_plain_name(name.replace(":", "_"))


def is_plain_name(name: str) -> bool:
    """True for names that are safe as file names inside the cache; hook names are."""
    return bool(name) and name.isascii() and name[0] != "." and all(c.isalnum() or c in "._-" for c in name)
