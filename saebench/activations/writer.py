"""CacheWriter: writes a cache so that a killed writer can resume and end with the same bytes.

Rows are appended in an order that the caller can repeat. Every full shard is written whole (temporary name,
fsync, rename) and then recorded in journal.json (saebench/core/journal.py). A writer that finds a journal
with its own identity keeps the shards recorded there; the caller produces its rows again from the start and
may `skip` those below `keeps`. manifest.json is written last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from saebench.activations.diagnosis import diagnose, largest_norm
from saebench.activations.manifest import (
    HOOK_PREFIX,
    MANIFEST_NAME,
    CacheColumn,
    Shard,
    block_checksums,
    column_folder,
    head_of_manifest,
    is_unit_column,
    read_cache_manifest,
)
from saebench.activations.mapping import map_column
from saebench.activations.shards import (
    DATA_START,
    TORCH_DTYPES,
    check_shard,
    shard_path,
    sums_of,
    write_shard,
)
from saebench.core.errors import UserError
from saebench.core.files import (
    TEMPORARY_SUFFIX,
    finite,
    make_directory,
    require_writable,
    sentence_for_os_errors,
    write_bytes_atomic,
    write_json_atomic,
)
from saebench.core.journal import Entry, Journal, read_journal
from saebench.core.reading import check_shape
from saebench.core.shapes import Number, Sha256, Shape
from saebench.sources.base import ColumnType, Site
from saebench.sources.modality import modality as find_modality
from saebench.sources.model_identity import IDENTITY, same_model

JOURNAL_NAME = "journal.json"
LOCK_NAME = ".lock"

Types = Mapping[str, ColumnType]


class _Note(Shape):
    """A line of the journal on a finished shard of all columns of a group."""

    group: Literal["rows", "contexts"]
    sha256: dict[str, Sha256]
    norms: dict[str, Number | None] = Field(default_factory=dict)
    """The largest norm of each site; None if it is beyond float32."""


class _MaxNorm(Shape):
    limit: dict[str, Number]


class _Found(Shape):
    max_norm: _MaxNorm | None = None


class _Facts(Shape):
    facts: _Found


class _Begun(Shape):
    identity: dict[str, Any]


State = Literal["empty", "unfinished", "complete"]


def inspect_target(path: Path, identity: Mapping[str, Any]) -> State:
    """Whether directory ``path`` holds nothing, an unfinished or the complete cache described by
    ``identity``; a complete one is freed of the journal that a killed writer may have left.

    Raises:
        UserError: the directory holds a different cache, or other files.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; choose another --out")
    if (path / MANIFEST_NAME).exists():
        _require_same(path, read_cache_manifest(path).raw["made_from"], identity, unfinished=False)
        _clean_up(path)
        return "complete"
    if (path / JOURNAL_NAME).exists():
        _require_same(path, _read_journal(path)[0], identity)
        return "unfinished"
    names = [entry.name for entry in path.iterdir()] if path.exists() else []
    unexpected = sorted(name for name in names if name != LOCK_NAME and not name.endswith(TEMPORARY_SUFFIX))
    if unexpected:
        raise UserError(f"{path} is not a cache but holds {unexpected[0]!r}; choose another --out")
    return "empty"


def _clean_up(path: Path) -> None:
    """Delete the journal of a complete cache, where the disk can be written."""
    with contextlib.suppress(OSError):
        (path / JOURNAL_NAME).unlink(missing_ok=True)


class CacheWriter:
    """Appends rows and units to the cache in ``path``; a context manager, used under its directory lock.

    ``rows`` and ``contexts`` are the two groups of columns, per row and per unit. One shard is written in the
    background while the next one is filled, so memory holds two shards of every column. ``identity`` is JSON
    that says what the cache is made from: unfinished work is resumed only if it is the same, and it becomes
    ``made_from`` in the manifest.
    """

    def __init__(
        self,
        path: Path,
        *,
        kind: Literal["harvest", "import"],
        sites: Mapping[str, Site],
        modality: str,
        columns: Types,
        shard_rows: int,
        identity: Mapping[str, Any],
    ) -> None:
        self.path = path
        of = find_modality(modality)
        self._head = head_of_manifest(kind, modality, sites, columns, identity)
        self._identity = dict(identity)
        require_writable(path, what="the activation cache")
        self._norms: dict[str, float] = {}
        """Column of a site -> the largest norm of its rows on disk."""
        self._from_older_version = False
        """True for unfinished work whose journal has no norms."""
        self.facts: dict[str, Any] = {}
        """What was found out before the first row, by its key in the manifest; see `note`."""
        self._types, self._shard_rows = columns, shard_rows
        groups: dict[str, list[str]] = {"rows": [], "contexts": []}
        for name in columns:
            groups["contexts" if is_unit_column(name, of) else "rows"].append(name)
        done = self._take_over(columns, groups)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shard-writer")
        self.rows, self.contexts = (
            ColumnGroup(self, group, {name: columns[name] for name in names}, shard_rows, done[group])
            for group, names in groups.items()
        )
        self._flushing: Future[None] | None = None

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._executor.shutdown(wait=True)
        self._journal.close()
        if kind is not None and not self.rows.shards and not self.contexts.shards:
            self._clear()

    def _clear(self) -> None:
        """Nothing was written: empty the directory, so that it can be used with other settings."""
        for name in self._types:
            shutil.rmtree(self.path / name.split("/")[0], ignore_errors=True)
        (self.path / JOURNAL_NAME).unlink(missing_ok=True)

    def note(self, name: str, fact: Any) -> None:
        """Keep JSON that was found out before the first row was appended, in the journal and the manifest."""
        self._wait()
        self.facts[name] = fact
        self._journal.append({"facts": self.facts})

    def finish(self, files: Mapping[str, bytes], *, left_out: Mapping[str, int] | None = None) -> None:
        """Write the remaining rows, the other ``files``, and the manifest, which makes the cache complete.

        ``left_out`` says how much of what was read is not in the cache, by reason; the manifest keeps it.
        """
        self.rows.flush()
        self.contexts.flush()
        self._wait()
        for name, data in files.items():
            write_bytes_atomic(self.path / name, data)
        columns = {**self.rows.columns(), **self.contexts.columns()}
        manifest = {
            **self._head,
            "n_rows": self.rows.position,
            "n_contexts": self.contexts.position,
            "shard_rows": self._shard_rows,
            "columns": {name: column.to_json() for name, column in columns.items()},
            "files": {
                name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                for name, data in files.items()
            },
            "block_checksums": block_checksums(columns),
            "diagnosis": self._diagnose(columns),
            "made_from": self._identity,
            **({"left_out": dict(left_out)} if left_out else {}),
            **self.facts,
        }
        write_json_atomic(self.path / MANIFEST_NAME, manifest)
        _clean_up(self.path)

    def _diagnose(self, columns: Mapping[str, CacheColumn]) -> dict[str, Any]:
        def read(name: str) -> Tensor:
            return map_column(self.path, name, columns[name])

        hooks: list[str] = self._head["hooks"]
        sites = {hook: read(HOOK_PREFIX + hook) for hook in hooks}
        norms = self._norms
        if self._from_older_version:
            norms = {HOOK_PREFIX + hook: largest_norm(x_ND) for hook, x_ND in sites.items()}
        largest = {hook: norms[HOOK_PREFIX + hook] for hook in hooks}
        return diagnose(sites, largest, read("held_out"), read("doc") if "doc" in columns else None)

    def submit(self, group: str, index: int, rows: dict[str, Tensor], types: Types) -> None:
        """Write one shard of every column of a group in the background; waits for the previous shard."""
        self._wait()
        self._flushing = self._executor.submit(self._write, group, index, rows, types)

    def _wait(self) -> None:
        if self._flushing is not None:
            flushing, self._flushing = self._flushing, None
            flushing.result()

    def _write(self, group: str, index: int, rows: dict[str, Tensor], types: Types) -> None:
        sums, norms = {}, {}
        for name, tensor in rows.items():
            folder = self.path / column_folder(name)
            with sentence_for_os_errors(folder):
                make_directory(folder)
            sums[name] = write_shard(shard_path(folder, index), tensor, types[name].dtype)
            if name.startswith(HOOK_PREFIX):
                norms[name] = largest_norm(tensor)
        owner = self.rows if group == "rows" else self.contexts
        n_rows = len(next(iter(rows.values())))
        owner.shards.append({name: Shard(n_rows, *own) for name, own in sums.items()})
        if n_rows == self._shard_rows:
            sha256 = {name: own.sha256 for name, own in sums.items()}
            known = {"norms": finite(norms)} if norms else {}
            self._journal.append({"group": group, "sha256": sha256, **known})
        self._note_norms(norms)

    def _note_norms(self, norms: Mapping[str, float | None]) -> None:
        for name, known in norms.items():
            norm = math.inf if known is None else known
            self._norms[name] = max(norm, self._norms.get(name, 0.0))

    def _take_over(
        self, columns: Types, groups: Mapping[str, list[str]]
    ) -> dict[str, list[dict[str, Shard]]]:
        """Clear away what a killed writer left half done; return the shards that it finished."""
        for leftover in self.path.rglob(f".*{TEMPORARY_SUFFIX}"):
            leftover.unlink()
        done: dict[str, list[dict[str, Shard]]] = {"rows": [], "contexts": []}
        broken: set[str] = set()
        notes = _read_journal(self.path)[1] if (self.path / JOURNAL_NAME).exists() else []
        kept: list[Entry] = []
        for note in notes:
            try:
                check_shape(note, _Facts if "facts" in note else _Note, source="the note")
            except UserError:
                break
            if "facts" in note:
                self.facts = note["facts"]
                kept.append(note)
                continue
            group, sums = note["group"], note["sha256"]
            if sums.keys() != {*groups[group]}:
                break
            shards = None if group in broken else self._intact(sums, columns, len(done[group]))
            if shards is None:
                broken.add(group)
            else:
                done[group].append(shards)
                self._from_older_version |= group == "rows" and "norms" not in note
                self._note_norms(note.get("norms", {}))
                kept.append(note)
        self._journal = Journal(self.path / JOURNAL_NAME, [{"identity": self._identity}, *kept])
        return done

    def _intact(self, sums: Mapping[str, str], columns: Types, index: int) -> dict[str, Shard] | None:
        """The shards number ``index`` of a group, if all of them have the checksums that the journal says."""
        shards = {}
        for name, sha256 in sums.items():
            kind = columns[name]
            path, shape = (
                shard_path(self.path / column_folder(name), index),
                (self._shard_rows, *kind.row_shape),
            )
            try:
                check_shard(path, kind.dtype, shape)
            except UserError:
                return None
            data = memoryview(path.read_bytes())
            found = sums_of(bytes(data[:DATA_START]), data[DATA_START:])
            if found.sha256 != sha256:
                return None
            shards[name] = Shard(self._shard_rows, *found)
        return shards


class ColumnGroup:
    """Columns with the same number of rows. ``position`` is the number of rows appended or skipped."""

    def __init__(
        self,
        writer: CacheWriter,
        name: str,
        types: dict[str, ColumnType],
        shard_rows: int,
        done: list[dict[str, Shard]],
    ) -> None:
        self._writer, self._name, self._types, self._shard_rows = writer, name, types, shard_rows
        self.shards = done
        self.keeps = len(done) * shard_rows
        """Rows below this number are on disk already."""
        self.position = 0
        self._filled = 0
        self._submitted = len(done)
        self._buffers: dict[str, Tensor] = {}

    def skip(self, n_rows: int) -> None:
        """Advance ``position`` over rows that are on disk already."""
        self.position += n_rows
        assert self.position <= self.keeps, (self.position, self.keeps)

    def append(self, rows: Mapping[str, Tensor]) -> None:
        """Append the same number of rows to every column; rows that are on disk already are dropped."""
        assert rows.keys() == self._types.keys(), (rows.keys(), self._types.keys())
        n_rows = len(next(iter(rows.values())))
        start = min(max(self.keeps - self.position, 0), n_rows)
        self.position += n_rows
        while start < n_rows:
            if not self._buffers:
                self._buffers = {
                    name: torch.empty(self._shard_rows, *t.row_shape, dtype=TORCH_DTYPES[t.dtype])
                    for name, t in self._types.items()
                }
            end = min(n_rows, start + self._shard_rows - self._filled)
            for name, tensor in rows.items():
                self._buffers[name][self._filled : self._filled + end - start] = tensor[start:end]
            self._filled += end - start
            start = end
            if self._filled == self._shard_rows:
                self.flush()

    def flush(self) -> None:
        """Write the buffered rows as a shard."""
        if self._filled:
            rows = {name: buffer[: self._filled] for name, buffer in self._buffers.items()}
            self._writer.submit(self._name, self._submitted, rows, self._types)
            self._submitted += 1
        self._buffers, self._filled = {}, 0

    def columns(self) -> dict[str, CacheColumn]:
        return {
            name: CacheColumn(column_type, tuple(shard[name] for shard in self.shards))
            for name, column_type in self._types.items()
        }


def _read_journal(path: Path) -> tuple[Any, list[Entry]]:
    """The identity of an unfinished cache, and its finished shards in the order they were written."""
    first, *notes = read_journal(path / JOURNAL_NAME) or [{}]
    way_out = f"delete {path} and run the command again"
    check_shape(first, _Begun, source=str(path / JOURNAL_NAME), way_out=way_out)
    return first["identity"], notes


def _require_same(path: Path, seen: Any, wanted: Mapping[str, Any], *, unfinished: bool = True) -> None:
    wanted = _with_hashes_of(seen, json.loads(json.dumps(wanted)))
    (seen, seen_paths), (wanted, paths) = _without_paths(seen), _without_paths(wanted)
    difference = _difference(seen, wanted)
    if difference:
        raise UserError(f"{path} holds a different cache ({difference}); choose another --out or delete it")
    if unfinished and seen_paths != paths:  # rows on two paths are equal only up to rounding
        hook = next(hook for hook in {**seen_paths, **paths} if seen_paths.get(hook) != paths.get(hook))
        raise UserError(
            f"{path} is unfinished and was begun by a version of saebench that read {hook} in another way; "
            "finish it with that version, or delete it and begin again"
        )


def _with_hashes_of(seen: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """``wanted`` with the hashes in ``seen`` of models that are the same, by whatever rule they were made."""
    for key, models in (("model", [wanted.get("model")]), ("models", wanted.get("models", []))):
        before = seen.get(key) if isinstance(seen, dict) else None
        for one, other in zip(models, before if isinstance(before, list) else [before], strict=False):
            if isinstance(one, dict) and isinstance(other, dict) and same_model(one, other):
                one.pop(IDENTITY, None)
                one.update({name: other[name] for name in ("hash", IDENTITY) if name in other})
    return wanted


def _without_paths(identity: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The identity of a cache without model.paths, and model.paths."""
    model = identity.get("model")
    if not isinstance(model, dict):
        return identity, {}
    rest = {key: value for key, value in model.items() if key != "paths"}
    return {**identity, "model": rest}, model.get("paths", {})


def _difference(seen: Any, wanted: Any, name: str = "") -> str | None:
    """The first setting that differs, as words for an error sentence."""
    if isinstance(seen, dict) and isinstance(wanted, dict):
        for key in sorted({*seen, *wanted}):
            found = _difference(seen.get(key), wanted.get(key), f"{name}.{key}".lstrip("."))
            if found:
                return found
        return None
    return None if seen == wanted else f"its {name} is {seen}, not {wanted}"
