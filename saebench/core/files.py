"""Atomic file writes (temporary name, fsync, rename), JSON, directory locks, SHA-256, disk space.

Files are read by reading.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import filelock

from saebench.core.errors import UserError
from saebench.core.reading import open_file
from saebench.core.refusals import FORBIDDEN, FULL, NO_LOCKS, os_error_sentence, system_error

TEMPORARY_SUFFIX = ".partial"
SURROGATES = "backslashreplace"
r"""How JSON is encoded: a path that is not UTF-8 has lone surrogates, which become \\udc80 and the like."""


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path``; on a clean exit it is synced and renamed over ``path``.

    A process killed at any instant leaves the old ``path`` or the new one, never a partial file. If the body
    raises, the temporary file is removed. A full disk or a refused write becomes a UserError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with sentence_for_os_errors(path):
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
                hold(file.fileno())
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def sentence_for_os_errors(path: Path) -> Iterator[None]:
    """Turn the error of a full disk or a refused write into a UserError about ``path``."""
    try:
        yield
    except Exception as error:
        cause = system_error(error)
        if cause is not None and cause.errno in (*FULL, *FORBIDDEN):
            raise UserError(os_error_sentence(cause, path)) from error
        raise


def is_leftover(path: Path) -> bool:
    """Whether ``path`` is the temporary file of a writer that was killed."""
    return path.name.startswith(".") and path.name.endswith(TEMPORARY_SUFFIX)


def hold(descriptor: int) -> None:
    """Mark a temporary file or directory as being written until ``descriptor`` is closed or the process ends.

    Nothing happens on a file system without locks, where leftovers are kept.
    """
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_dead(directory: Path, name: str | None = None) -> None:
    """Delete what killed writers left in ``directory``, or what those of ``directory / name`` left.

    A writer that still runs holds its temporary file or directory, see `hold`; that is kept.
    """
    pattern = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.\d+{re.escape(TEMPORARY_SUFFIX)}")
    with contextlib.suppress(OSError):
        for path in [path for path in Path(directory).iterdir() if pattern.fullmatch(path.name)]:
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                finally:
                    os.close(descriptor)


def remove_leftovers(directory: Path) -> None:
    """Delete the temporary files of killed writers below ``directory``, whose lock the caller must hold."""
    for path in Path(directory).rglob(f".*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Make the entries of ``path`` durable: what was created, renamed or removed in it.

    Nothing happens where the system does not sync directories, or does not let this one be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create ``path`` and the directories above it, each with a durable entry in its parent.

    The entry of a directory that exists already is synced too: the process that made it may have been killed
    before it did that.
    """
    path = Path(path).absolute()
    missing = list(itertools.takewhile(lambda folder: not folder.exists(), (path, *path.parents)))
    for folder in reversed(missing or [path]):
        folder.mkdir(exist_ok=True)
        sync_directory(folder.parent)


def append_line(path: Path, line: str) -> None:
    """Append one line durably. Half a line that a killed writer left before it is ended first."""
    with sentence_for_os_errors(path), open(path, "a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        broken = file.read() not in (b"", b"\n")
        file.write((b"\n" if broken else b"") + line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    with atomic_file(path) as file:
        file.write(data)


def write_json_atomic(path: Path, value: object) -> None:
    """Write JSON with sorted keys, so that equal values are equal bytes."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_bytes_atomic(path, (text + "\n").encode("utf-8", SURROGATES))


def finite(value: Any) -> Any:
    """``value`` with None in place of NaN and the infinities, which JSON does not have, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def sha256_file(path: Path) -> str:
    with open_file(path, what="the file") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: object) -> str:
    """SHA-256 of a value that can be written as JSON, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", SURROGATES)).hexdigest()


@contextlib.contextmanager
def directory_lock(directory: Path, *, what: str) -> Iterator[None]:
    """Lock ``directory`` for one writer; a second writer gets a UserError at once.

    The operating system releases the lock when the process ends, so a killed writer does not block the next.
    On a file system without locks the work goes on without one, with a warning.
    """
    directory = Path(directory)
    require_writable(directory, what=what)
    lock = filelock.FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(
            f"another process is writing {what} {directory}; wait until it ends, or choose another directory"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise UserError(os_error_sentence(error, directory / ".lock")) from None
        print(
            f"warning: the file system of {what} {directory} has no locks ({os.strerror(error.errno)}); "
            "do not write it with two commands at once",
            file=sys.stderr,
        )
    try:
        yield
    finally:
        lock.release()


def require_writable(directory: Path, *, what: str) -> None:
    """Create ``directory`` and check that files can be written in it."""
    directory = Path(directory)
    try:
        make_directory(directory)
    except (FileExistsError, NotADirectoryError):
        raise UserError(
            f"{what} {directory} cannot be created because a file has that name; choose another --out"
        ) from None
    except OSError as error:
        raise UserError(f"cannot create {what} {directory}: {error.strerror}; choose another --out") from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"{what} {directory} is not writable; choose another --out")


def require_writable_file(path: Path, *, what: str) -> None:
    """Check that the file ``path`` can be written, before the work that produces its content."""
    path = Path(path)
    require_writable(path.parent, what=f"the directory of {what}")
    if path.is_dir():
        raise UserError(f"{what} {path} is a directory; give --out a file name")


def require_disk(directory: Path, n_bytes: int, *, what: str) -> None:
    """Raise a UserError when the file system of ``directory`` has less than ``n_bytes`` free."""
    existing = Path(directory).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise UserError(
            f"{what} needs {human_bytes(n_bytes)} but {directory} has {human_bytes(free)} free; "
            "free some space, choose another place, or lower --tokens"
        )


def free_memory() -> int | None:
    """Bytes that processes can still have, on Linux."""
    try:
        text = Path("/proc/meminfo").read_text()
        return int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]
    except (OSError, TypeError):
        return None


def human_bytes(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"
