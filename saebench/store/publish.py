"""Atomic generations of a store: building, publishing and reading them, and removing old ones.

    store/manifest.json                     points at the files of the current generation; replaced atomically
    store/gen-000002/manifest.json          the same, kept with the generation
    store/gen-000002/sae-<hash>.duckdb      never changed once published
    store/gen-000001/text-<hash>.duckdb     still in use: a manifest may point into older generations
    store/.building/                        a build in progress, or the files that a killed one left
    store/.encoded/                         codes that are not in a generation yet, see encode.py

A process that is killed at any time leaves the manifest of the old generation or of the new one. Readers hold
a shared lock on the manifest of their generation. A file is kept while the current generation, the
previous one or a generation with a reader uses it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import Field

from saebench.core.errors import UserError
from saebench.core.files import sha256_file, sync_directory, write_json_atomic
from saebench.core.reading import MAKE_AGAIN, check_shape, read_json
from saebench.core.shapes import Count, Name, Positive, Sha256, Shape, Text
from saebench.store.schema import FORMAT_VERSION

FORMAT = "saebench store"
MANIFEST = "manifest.json"
BUILDING = ".building"
_INSIDE = r"^gen-[0-9]{6,}/%s\w[\w.-]*\.duckdb$"
"""Paths that a manifest may name: a store that came from elsewhere must not open files outside it."""


class _File(Shape):
    path: Annotated[Text, Field(pattern=_INSIDE % "")]
    bytes: Count
    sha256: Sha256


class _SaeFile(_File):
    path: Annotated[Text, Field(pattern=_INSIDE % "sae-")]


class _TextFile(_File):
    path: Annotated[Text, Field(pattern=_INSIDE % "text-")]


class _Sae(Shape):
    name: Name
    text: Name | None
    file: _SaeFile
    extras: dict[str, _File] = Field(default_factory=dict)


class _Manifest(Shape):
    generation: Positive
    saes: list[_Sae]
    texts: dict[str, _TextFile]


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file of the store; ``path`` is relative to the store's directory."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class StoredSae:
    """One SAE: its file, and the hash of the text that it was indexed over (None for a cache without text).

    ``extras``: name -> file of an extra, which is derived from the SAE's file after indexing (extras.py).
    """

    name: str
    file: StoredFile
    text: str | None
    extras: dict[str, StoredFile] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    generation: int = 0
    saes: tuple[StoredSae, ...] = ()
    texts: dict[str, StoredFile] = field(default_factory=dict)

    def sae(self, name: str) -> StoredSae:
        return next(sae for sae in self.saes if sae.name == name)

    def files(self) -> list[StoredFile]:
        extras = [file for sae in self.saes for file in sae.extras.values()]
        return [sae.file for sae in self.saes] + list(self.texts.values()) + extras

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}

    def next(self, sae: StoredSae, text: StoredFile | None) -> Manifest:
        """The next generation, in which ``sae`` is added or replaces the SAE of the same name."""
        known = [old.name for old in self.saes]
        saes = tuple(sae if old.name == sae.name else old for old in self.saes)
        saes = saes if sae.name in known else (*saes, sae)
        texts = self.texts | ({sae.text: text} if sae.text and text else {})
        used = {one.text for one in saes}
        return Manifest(
            generation=self.generation + 1,
            saes=saes,
            texts={key: file for key, file in texts.items() if key in used},
        )


def read_manifest(store: Path) -> Manifest:
    """The current generation.

    Raises:
        UserError: there is no store, its manifest is damaged, or its format is newer than this version reads.
    """
    path = Path(store) / MANIFEST
    if not path.exists():
        if path.parent.is_dir():
            _require_first_build(path.parent, "run saebench index into another directory")
        raise UserError(
            f"{store} is not a feature store (it has no {MANIFEST}); make one with saebench index"
        )
    return parse_manifest(path)


def parse_manifest(path: Path) -> Manifest:
    try:
        content = read_json(path, what="the store manifest")
    except UserError as error:
        raise _damaged(path, "it is not JSON") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not the manifest of a feature store; check the path")
    version = content.get("format_version")
    if type(version) is not int or version > FORMAT_VERSION:
        raise UserError(
            f"the store {path.parent} has format {version!r:.60} and this saebench reads up to "
            f"{FORMAT_VERSION}; install a newer saebench, or run saebench index into another directory"
        )
    try:
        check_shape(content, _Manifest, source="it")
        saes = tuple(
            StoredSae(
                name=sae["name"],
                text=sae["text"],
                file=_file(sae["file"]),
                extras={name: _file(file) for name, file in sae.get("extras", {}).items()},
            )
            for sae in content["saes"]
        )
        manifest = Manifest(
            generation=content["generation"],
            saes=saes,
            texts={key: _file(file) for key, file in content["texts"].items()},
        )
        names = [sae.name for sae in saes]
        if len({*names}) < len(names) or not saes:
            raise UserError("its SAEs do not have different names")
        if lost := {sae.text for sae in saes} - {None, *manifest.texts}:
            raise UserError(f"it has no text {lost.pop()!r:.60}")
        return manifest
    except UserError as error:
        reason = str(error).removeprefix("it is damaged: ").removesuffix(f"; {MAKE_AGAIN}")
        raise _damaged(path, reason) from None


def _file(content: dict[str, Any]) -> StoredFile:
    return StoredFile(**{name: content[name] for name in ("path", "bytes", "sha256")})


def _damaged(path: Path, reason: str) -> UserError:
    copies = [folder / MANIFEST for folder in generations(path.parent) if (folder / MANIFEST).is_file()]
    way_out = f"copy {copies[-1]} over it, or run " if copies else "run "
    return UserError(
        f"the store manifest {path} is damaged ({reason}); {way_out}saebench index into another directory"
    )


def before_next(store: Path) -> Manifest:
    """The generation that a build into the directory ``store`` would follow; changes nothing.

    Raises:
        UserError: the directory has content but is not a store, or its manifest cannot be read.
    """
    if (store / MANIFEST).exists():
        return read_manifest(store)
    ours = (".lock", BUILDING, ".encoded", ".explain", "user.sqlite", "user.sqlite-wal", "user.sqlite-shm")
    unexpected = [p.name for p in store.iterdir() if p.name not in ours and not _number(p)]
    if unexpected:
        raise UserError(
            f"{store} is not a feature store and not empty ({unexpected[0]}); choose another --out"
        )
    _require_first_build(store, "choose another --out")
    return Manifest()


def begin(store: Path) -> tuple[Manifest, Path]:
    """Remove what killed builds left, and make an empty build directory. The caller holds the store's lock.

    Raises:
        UserError: see `before_next`.
    """
    current = before_next(store)
    building = store / BUILDING
    shutil.rmtree(building, ignore_errors=True)
    for directory in generations(store):
        if _number(directory) > current.generation:
            shutil.rmtree(directory)
    building.mkdir()
    return current, building


def _require_first_build(store: Path, way_out: str) -> None:
    """Raise a UserError when a store without a manifest has more than its first generation.

    A first build that was killed just before it was published leaves one generation. A later generation means
    that the manifest was lost, so the files must not be removed.
    """
    found = generations(store)
    if any(_number(folder) > 1 for folder in found):
        raise UserError(
            f"the store {store} has lost its {MANIFEST}; copy {found[-1] / MANIFEST} to {store / MANIFEST}, "
            f"or {way_out}"
        )


def publish(store: Path, current: Manifest, saes: Sequence[StoredSae], text: StoredFile | None) -> Manifest:
    """Make the build directory the next generation, in which ``saes`` are added or replaced.

    ``text`` is the text file that was built with them; None when the store has it already. A path without a
    folder is that of a new file and relative to the build directory.
    """
    folder = f"gen-{current.generation + 1:06d}"

    def placed(file: StoredFile) -> StoredFile:
        return file if "/" in file.path else replace(file, path=f"{folder}/{file.path}")

    text = placed(text) if text else None
    manifest = current
    for sae in saes:
        extras = {name: placed(file) for name, file in sae.extras.items()}
        manifest = manifest.next(replace(sae, file=placed(sae.file), extras=extras), text)
    manifest = replace(manifest, generation=current.generation + 1)
    write_json_atomic(store / BUILDING / MANIFEST, manifest.to_json())
    os.rename(store / BUILDING, store / folder)
    sync_directory(store)
    write_json_atomic(store / MANIFEST, manifest.to_json())
    collect(store, manifest)
    return manifest


def describe(path: Path) -> StoredFile:
    """Size and checksum of a finished file of the build directory."""
    return StoredFile(path=path.name, bytes=path.stat().st_size, sha256=sha256_file(path))


def is_intact(store: Path, file: StoredFile) -> bool:
    """Whether a published file still has its size and its checksum."""
    path = store / file.path
    return path.is_file() and path.stat().st_size == file.bytes and sha256_file(path) == file.sha256


def collect(store: Path, current: Manifest) -> None:
    """Remove the files that neither the last two generations nor a generation with a reader refer to."""
    kept = {file.path for file in current.files()}
    folders = generations(store)
    for folder in folders:
        number = _number(folder)
        if number >= current.generation - 1 or _is_read(folder):
            kept |= {file.path for file in parse_manifest(folder / MANIFEST).files()}
            kept.add(f"{folder.name}/{MANIFEST}")
    for folder in folders:
        for path in folder.iterdir():
            if f"{folder.name}/{path.name}" not in kept:
                path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def generations(store: Path) -> list[Path]:
    """The folders of generations, oldest first."""
    return sorted((path for path in store.iterdir() if _number(path)), key=_number)


def hold(store: Path, manifest: Manifest) -> IO[bytes] | None:
    """Mark a generation as being read until the returned file is closed."""
    path = store / f"gen-{manifest.generation:06d}" / MANIFEST
    try:
        file = open(path, "rb")  # noqa: SIM115 - it is the lock; the reader closes it
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
    except OSError:  # a file system without locks; the previous generation is kept in any case
        file.close()
        return None
    return file


def _is_read(folder: Path) -> bool:
    try:
        with open(folder / MANIFEST, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _number(path: Path) -> int:
    match = re.fullmatch(r"gen-(\d{6,})", path.name)
    return int(match[1]) if match else 0
