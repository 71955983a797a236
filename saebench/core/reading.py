"""Reading of files that may be damaged, foreign or hostile: a value that is used is checked first.

Every file is opened, bounded and checked here, and what is wrong becomes one sentence (UserError) with the
file, the field, what was expected and what was found. Directories, pipes, sockets and devices are refused. A
shape (shapes.py) says what a JSON file must have; other keys are kept, so that files of newer versions open.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.core.errors import UserError

if TYPE_CHECKING:
    from saebench.core.shapes import Shape

MOST_BYTES = 2**30
"""A file that is read whole is refused if it is larger."""
MOST_LEVELS = 100
"""Lists and objects of JSON nested deeper are refused."""
MAKE_AGAIN = "restore a copy or make it again"
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_file(path: Path, *, what: str, way_out: str = "check the path") -> int:
    """The size in bytes of the regular file ``path``, which is not opened.

    For files that a library opens by name: opening a pipe waits forever, and reading a device may never end.

    Raises:
        UserError: it does not exist, or it is something else than a file.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise _cannot_read(path, error, what, way_out) from None
    return _size(status, path, what, way_out)


def open_file(path: Path, *, what: str, way_out: str = "check the path") -> BufferedReader:
    """Open the regular file ``path`` to read its bytes.

    Raises:
        UserError: it does not exist, cannot be read, or is something else than a file.
    """
    require_file(path, what=what, way_out=way_out)  # opening some devices has an effect
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise _cannot_read(path, error, what, way_out) from None
    try:
        _size(os.fstat(descriptor), path, what, way_out)  # it may have been replaced meanwhile
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path, *, what: str, way_out: str = "check the path", at_most: int = MOST_BYTES) -> bytes:
    """The content of a file of at most ``at_most`` bytes; ``what`` names it in the error ("the text").

    Raises:
        UserError: as `open_file`, or the file is larger.
    """
    with open_file(path, what=what, way_out=way_out) as file:
        try:
            too_large = os.fstat(file.fileno()).st_size > at_most
            content = b"" if too_large else file.read(at_most + 1)
        except OSError as error:
            raise _cannot_read(path, error, what, way_out) from None
    if too_large or len(content) > at_most:  # it may grow meanwhile
        raise UserError(f"{what} {path} has more than {at_most:,} bytes, which it cannot need; {way_out}")
    return content


def read_text(path: Path, *, what: str, way_out: str = "check the path", at_most: int = MOST_BYTES) -> str:
    """The content of a file of UTF-8.

    Raises:
        UserError: as `read_bytes`, or it is not UTF-8.
    """
    try:
        return read_bytes(path, what=what, way_out=way_out, at_most=at_most).decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{what} {path} is not UTF-8 ({error.reason} at byte {error.start}); {way_out}"
        ) from None


def read_json(
    path: Path,
    *,
    what: str,
    shape: type[Shape] | None = None,
    way_out: str = MAKE_AGAIN,
    nonfinite: bool = False,
) -> Any:
    """The content of a JSON file.

    Args:
        what: names the file in the error ("the cache manifest").
        shape: what an object must have; None if the caller checks the value.
        way_out: what to do if the file is damaged.
        nonfinite: accept NaN and infinities, which JSON does not have but other programs write.

    Raises:
        UserError: as `read_bytes`, or it is not JSON, or not of that ``shape``.
    """
    content = read_bytes(path, what=what)
    try:
        value = parse_json(content, nonfinite=nonfinite)
    except ValueError as error:
        raise UserError(f"{what} {path} is damaged ({shown(str(error))}); {way_out}") from None
    if shape is not None:
        check_shape(value, shape, source=f"{what} {path}", way_out=way_out)
    return value


def parse_json(content: bytes | str, *, nonfinite: bool = False) -> Any:
    """``json.loads`` for text of any origin; a key that an object has twice is refused.

    Raises:
        ValueError: it is not JSON, not UTF-8, nested too deeply, or has a number that Python does not hold.
    """

    def refused(text: str) -> float:
        raise ValueError(f"{text} is not a number of JSON")

    def number(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else refused(text[:40])

    try:
        value = json.loads(
            content,
            object_pairs_hook=_object,
            parse_float=None if nonfinite else number,
            parse_constant=None if nonfinite else refused,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_levels(value)
    return value


def check_shape(value: Any, shape: type[Shape], *, source: str, way_out: str = MAKE_AGAIN) -> None:
    """Raise a UserError unless ``value`` is an object of ``shape``.

    Args:
        source: names what holds the value ("the cache manifest runs/manifest.json").
    """
    import pydantic

    try:
        shape.model_validate(value)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(shown(str(part), 40) for part in first["loc"]) or "its content"
        if first["type"] == "missing":
            raise UserError(f"{source} is damaged: it has no {name}; {way_out}") from None
        reason = first["msg"][:1].lower() + first["msg"][1:]
        reason = reason.removeprefix("value error, ").removeprefix("input ")
        reason = reason.partition(" or instance of")[0]
        found = shown(repr(first["input"]))
        raise UserError(
            f"{source} is damaged: {name} is {found} and {shown(reason, 200)}; {way_out}"
        ) from None


def shown(text: str, most: int = 60) -> str:
    """``text`` in one line of at most ``most`` characters, all of which can be printed."""
    text = text.encode("utf-8", "backslashreplace").decode()
    line = "".join(c if c.isprintable() else " " for c in text)
    line = " ".join(line.split())
    return line if len(line) <= most else line[: most - 3] + "..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.60} is there twice")
    return found


def _check_levels(value: Any) -> None:
    """Refuse deep nesting: code that walks a value calls itself at each level."""
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [item for parent in level for item in _children(parent) if isinstance(item, dict | list)]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _size(status: os.stat_result, path: Path, what: str, way_out: str) -> int:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise UserError(f"{what} {path} cannot be read because it is {kind} and not a file; {way_out}")
    return status.st_size


def _cannot_read(path: Path, error: Exception, what: str, way_out: str) -> UserError:
    name = shown(str(path), 400)
    if isinstance(error, FileNotFoundError):
        return UserError(f"{what} {name} does not exist; {way_out}")
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return UserError(f"{what} {name} cannot be read ({reason}); {way_out}")
