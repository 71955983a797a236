"""What the operating system refuses (a full disk, a lock, memory, a name) as one sentence.

The command line and the public functions of Python turn such errors into these sentences.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from saebench.core.errors import UserError

P = ParamSpec("P")
ResultT = TypeVar("ResultT")

RUN_AGAIN = "run the same command again"
"""Part of every sentence on a full disk; `resumes` adds how a training is continued."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_LIBRARIES = ("safetensors", "duckdb", "_duckdb", "sqlite3", "pyarrow")
_ADVICE = {
    errno.EMFILE: "raise the limit of open files with ulimit -n",
    errno.ENFILE: "close other programs",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "it was moved or deleted; restore it",
    errno.EIO: "the disk or the network drive fails; copy the data elsewhere",
    errno.ESTALE: "the network drive was disconnected; try again",
}


def os_error_sentence(error: OSError, path: str | Path | None = None) -> str:
    """What the system refused, where, and what to do. ``path`` is used if the error names no file."""
    reason = os.strerror(error.errno) if error.errno else str(error) or type(error).__name__
    place = path if path is not None else error.filename
    named = "" if place is None else f" {_shown(place)}"
    if error.errno in FULL:
        return (
            f"no space left while writing{named} ({reason}); free some space and {RUN_AGAIN}, "
            "or choose another place"
        )
    if error.errno in FORBIDDEN:
        return (
            f"cannot write{named}: {reason}; choose another place"
            if path is not None
            else (f"cannot open{named}: {reason}; change its permissions or choose another place")
        )
    advice = _ADVICE.get(error.errno or 0, "check the path and the disk")
    return f"the system refuses{named or ' an operation'}: {reason}; {advice}"


def system_error(error: BaseException) -> OSError | None:
    """``error`` as an OSError; None if the system did not cause it.

    safetensors, DuckDB, SQLite and pyarrow raise errors of their own for a full disk, with its name in their
    text.
    """
    if isinstance(error, OSError):
        if error.errno is not None:
            return error
    elif not type(error).__module__.startswith(_LIBRARIES):
        return None
    text = str(error)
    for number in FULL:
        if os.strerror(number) in text:
            return OSError(number, os.strerror(number))
    if "disk is full" in text:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return error if isinstance(error, OSError) else None


def refusal(error: BaseException) -> str | None:
    """The sentence for an error that the system causes; None for any other error."""
    if (cause := system_error(error)) is not None:
        return os_error_sentence(cause)
    if isinstance(error, UnicodeEncodeError) and "\ud800" <= error.object[error.start] <= "\udfff":
        return (
            f"the name {_shown(error.object[:400])} is not UTF-8, which a library that reads it needs; "
            "rename the file or folder"
        )
    return None


def out_of_memory(error: BaseException) -> str | None:
    """The first line of an error of Python, NumPy, torch or DuckDB that says that memory is full, or None."""
    text = str(error)
    torch, duckdb = sys.modules.get("torch"), sys.modules.get("duckdb")
    known = (
        isinstance(error, MemoryError)
        or (torch is not None and isinstance(error, torch.OutOfMemoryError))
        or (duckdb is not None and isinstance(error, duckdb.OutOfMemoryException))
        or (
            isinstance(error, RuntimeError)
            and any(words in text for words in ("DefaultCPUAllocator: ", "bad allocation", "std::bad_alloc"))
        )
    )
    if not known:
        return None
    line = text.strip().split("\n", 1)[0].split(". ", 1)[0].strip().rstrip(".")
    return f"out of memory ({line})" if line else "out of memory"


@contextlib.contextmanager
def system_refusals() -> Iterator[None]:
    """Raise a UserError for what the system refuses."""
    try:
        yield
    except Exception as error:
        if isinstance(error, BrokenPipeError) or (sentence := refusal(error)) is None:
            raise
        raise UserError(sentence) from error


def resumes(function: Callable[P, ResultT]) -> Callable[P, ResultT]:
    """Let the sentences of ``function`` on a full disk say that --resume continues the work."""

    @functools.wraps(function)
    def call(*arguments: P.args, **keywords: P.kwargs) -> ResultT:
        try:
            with system_refusals():
                return function(*arguments, **keywords)
        except UserError as error:
            if RUN_AGAIN not in str(error):
                raise
            raise UserError(str(error).replace(RUN_AGAIN, f"{RUN_AGAIN} with --resume")) from error

    return call


def _shown(path: Any) -> str:
    text = os.fsdecode(path) if isinstance(path, bytes | Path) else str(path)
    return text.encode("utf-8", "backslashreplace").decode()
