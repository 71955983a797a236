"""What makes two model folders the same model: weights by tensor, config and tokenizer.

How weights are cut into files does not count, nor do other files in the folder (notes, states of a training,
weights that transformers does not load), nor what the saving tool writes about itself. A file is read once
per version: results for large files are kept in the user's cache directory, by path, size and time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saebench.assets import cache_dir
from saebench.core.errors import UserError
from saebench.core.files import sha256_json, write_json_atomic
from saebench.core.reading import check_shape, parse_json, read_json
from saebench.core.shapes import TensorEntry

IDENTITY = "identity"
"""Key of a model in manifests, run.json and sae.json; versions before 0.2 wrote ``hash`` alone."""
HASHED_SUFFIXES = (".safetensors", ".json", ".model", ".txt")
"""Files in ``hash``, the rule of version 0.1: names and contents of all of them."""

_INDEX = "model.safetensors.index.json"
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip
_OF_THE_TOOL = {"_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype"}
"""Keys of configs that say nothing of the model: tensors have their own types."""
_KEPT_BYTES = 16 << 20
"""Smaller files are read again each time."""
_SETTLED_SECONDS = 2.0
"""A file that was changed more recently might change again within one tick of its modification time."""
_CHUNK = 4 << 20


def same_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two descriptions of models (``ModelInfo.to_json``) are of the same model."""
    if one.get(IDENTITY) and other.get(IDENTITY):
        return bool(one[IDENTITY] == other[IDENTITY])
    return one.get("hash") == other.get("hash")


def hashes_of_folder(folder: Path) -> tuple[str, str]:
    """``(hash, identity)`` of a model folder: by the rule of version 0.1, and by what the model is."""
    files = sorted(path for path in folder.iterdir() if path.suffix in HASHED_SUFFIXES and path.is_file())
    read = {path.name: _hash_file(path) for path in files}
    lines = "".join(f"{name} {found.sha256}\n" for name, found in read.items())
    weights: dict[str, Any] = {}
    for name in _weight_files(folder):
        if name in read:
            weights.update(read[name].tensors or {name: [read[name].sha256]})
    parts: dict[str, Any] = {"weights": weights, "config": _plain(folder / "config.json", read)}
    for name in _TOKENIZER:
        if name in read:
            parts[name] = _plain(folder / name, read)
    return hashlib.sha256(lines.encode()).hexdigest(), sha256_json(parts)


@dataclass(frozen=True)
class _FileHash:
    sha256: str
    tensors: dict[str, list[Any]] | None = None
    """Name -> type, shape and SHA-256 of the bytes; None where it is no file of tensors."""


def _weight_files(folder: Path) -> list[str]:
    """The files that transformers loads weights from."""
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    with contextlib.suppress(UserError):
        index = read_json(folder / _INDEX, what="the index of the weights")
        if isinstance(index, dict) and isinstance(index.get("weight_map"), dict):
            return sorted({str(name) for name in index["weight_map"].values()})
    return sorted(path.name for path in folder.glob("*.safetensors"))


def _plain(file: Path, read: Mapping[str, _FileHash]) -> Any:
    """A JSON object without what the saving tool writes about itself; the hash of another file."""
    with contextlib.suppress(UserError):
        values = read_json(file, what="a file of the model") if file.suffix == ".json" else None
        if isinstance(values, dict):
            return {name: value for name, value in values.items() if name not in _OF_THE_TOOL}
    return read[file.name].sha256 if file.name in read else None


def _hash_file(path: Path) -> _FileHash:
    """Read the file once, for its hash and those of its tensors; or what is kept of this version of it."""
    status = path.stat()
    place = str(path.resolve())
    version = [place, status.st_size, status.st_mtime_ns, status.st_ino]
    kept = cache_dir() / "hashes" / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:32]}.json"
    worth_keeping = status.st_size >= _KEPT_BYTES
    if worth_keeping:
        with contextlib.suppress(UserError, KeyError, TypeError):
            found = read_json(kept, what="a kept hash")
            if found["version"] == version:
                return _FileHash(found["sha256"], found["tensors"])
    made = _read_hashes(path)
    if worth_keeping and time.time() - status.st_mtime > _SETTLED_SECONDS:
        with contextlib.suppress(UserError, OSError):  # a cache directory that cannot be written
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(kept, {"version": version, "sha256": made.sha256, "tensors": made.tensors})
    return made


def _read_hashes(path: Path) -> _FileHash:
    whole = hashlib.sha256()
    with open(path, "rb") as file:
        if path.suffix != ".safetensors":
            return _FileHash(hashlib.file_digest(file, "sha256").hexdigest())
        head = file.read(8)
        n_head = int.from_bytes(head, "little")
        body = file.read(min(n_head, 100 << 20))
        whole.update(head + body)
        layout = _layout(body) if len(body) == n_head else None
        tensors: dict[str, list[Any]] = {}
        at = 0
        for start, end, name, kind, shape in layout or []:
            if start != at:  # gaps or overlaps: transformers refuses such a file
                layout = None
                break
            digest = hashlib.sha256()
            for chunk in _read(file, end - start):
                digest.update(chunk)
                whole.update(chunk)
                at += len(chunk)
            tensors[name] = [kind, shape, digest.hexdigest()]
        while chunk := file.read(_CHUNK):
            whole.update(chunk)
    return _FileHash(whole.hexdigest(), tensors if layout is not None else None)


def _layout(header: bytes) -> list[tuple[int, int, str, str, list[int]]] | None:
    """The tensors of a safetensors header in the order of their bytes; None where it is damaged."""
    try:
        values = parse_json(header)
        values.pop("__metadata__", None)
        for of in values.values():
            check_shape(of, TensorEntry, source="the tensor")
        return sorted((*of["data_offsets"], name, of["dtype"], of["shape"]) for name, of in values.items())
    except (ValueError, TypeError, AttributeError):
        return None


def _read(file: Any, n_bytes: int) -> Iterator[bytes]:
    while n_bytes > 0 and (chunk := file.read(min(_CHUNK, n_bytes))):
        n_bytes -= len(chunk)
        yield chunk
