"""Local files and folders of texts: their kinds, compression, and rows."""

from __future__ import annotations

import contextlib
import gzip
import io
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from saebench.core.errors import UserError
from saebench.core.reading import parse_json, require_file, shown

TABLES = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv",
}  # fmt: skip
"""Suffix of a file of rows -> the reader of `datasets`."""
COMPRESSIONS = (".gz", ".zst")
_OTHER_TABLES = {*TABLES, ".arrow"}
_JSON_LINES = (".jsonl", ".ndjson")
_NOT_TEXT = {
    ".arrow": "give its folder, as save_to_disk wrote it", ".pdf": "convert it to text",
    ".docx": "convert it to text", ".doc": "convert it to text", ".epub": "convert it to text",
    ".zip": "unpack it and give the folder", ".tar": "unpack it and give the folder",
    ".tgz": "unpack it and give the folder", ".7z": "unpack it and give the folder",
    ".bz2": "decompress it", ".xz": "decompress it", ".xlsx": "save it as .csv", ".xls": "save it as .csv",
    ".pkl": "save it as .jsonl or .parquet", ".npy": "save it as .parquet with a column of token ids",
    ".bin": "save it as .parquet with a column of token ids",
}  # fmt: skip
"""Suffix of files that are neither text nor rows -> what to do with one."""

Row = Mapping[str, Any]


def kind_of(path: Path) -> str:
    """The suffix of a file without that of its compression: ``.jsonl`` for ``texts.jsonl.zst``."""
    return (path.with_suffix("") if path.suffix in COMPRESSIONS else path).suffix.lower()


def is_plain_text(path: Path) -> bool:
    """True for a file that is read as text; False for a file of rows."""
    return kind_of(path) not in TABLES


def require_readable(path: Path, name: str) -> None:
    """Raise a UserError for a file of a kind that is neither text nor rows, by its suffix."""
    kind = kind_of(path)
    if kind in _NOT_TEXT:
        raise UserError(
            f"--text {name} is a {kind} file, which is neither text nor a table; {_NOT_TEXT[kind]}"
        )


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[io.TextIOBase]:
    """A file of UTF-8 text, opened for reading; .gz and .zst are decompressed.

    Raises:
        UserError: while reading, the file turns out to be damaged or not UTF-8.
    """
    try:
        with io.TextIOWrapper(cast(IO[bytes], open_bytes(path)), encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (invalid byte {error.object[error.start]:#04x}); convert it to UTF-8"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, error) from None


def open_bytes(path: Path) -> Any:
    """A binary file, opened for reading; .gz and .zst are decompressed.

    Raises:
        UserError: it does not exist, or is something else than a file.
    """
    require_file(path, what="the file")
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        import pyarrow

        return pyarrow.input_stream(str(path), compression="zstd")
    return open(path, "rb")


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    what = {".gz": "gzip", ".zst": "Zstandard"}.get(path.suffix)
    if what is None:
        return UserError(f"{path} cannot be read ({reason}); check the file")
    return UserError(f"{path} is not a whole {what} file ({reason}); download or compress it again")


def rows_of_file(path: Path) -> Iterator[Row]:
    """The rows of a .jsonl, .ndjson, .json, .parquet, .csv or .tsv file.

    Compressed JSON lines are decompressed while they are read, other compressed files into a temporary file.
    """
    import datasets

    if path.suffix in COMPRESSIONS and kind_of(path) in _JSON_LINES:
        yield from _json_lines(path)
        return
    with contextlib.ExitStack() as stack:
        plain = path
        if path.suffix in COMPRESSIONS:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            plain = _unpack(path, Path(folder))
        how = {"sep": "\t"} if kind_of(path) == ".tsv" else {}
        yield from datasets.load_dataset(
            TABLES[kind_of(path)], data_files=str(plain), split="train", streaming=True, **how
        )


def _json_lines(path: Path) -> Iterator[Row]:
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line, nonfinite=True)
            except ValueError as error:
                reason = shown(str(error))
                raise UserError(f"{path}, line {number} is not JSON ({reason}); correct it") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number} is not an object; write one object per line")
            yield row


def _unpack(path: Path, folder: Path) -> Path:
    unpacked = folder / path.with_suffix("").name
    try:
        with open_bytes(path) as source, open(unpacked, "wb") as target:
            shutil.copyfileobj(source, target)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, error) from None
    return unpacked


def document_files(folder: Path) -> list[Path] | None:
    """The files of a folder that are one document each, in the order of their paths.

    None when the folder holds tables, which `datasets` reads. Files and folders whose names begin with a dot
    are left out.
    """
    files = [
        path
        for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix())
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    return None if not files or any(kind_of(path) in _OTHER_TABLES for path in files) else files


def is_saved_data_set(folder: Path) -> bool:
    """True for a folder that `datasets` wrote with ``save_to_disk``."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def rows_of_saved_data_set(folder: Path, split: str) -> Iterator[Row]:
    """The rows of a folder that `datasets` wrote with ``save_to_disk``; of several splits, those of one.

    Raises:
        UserError: there is no such split.
    """
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise UserError(f"{folder} has no split {split!r}; pass --split with one of {', '.join(saved)}")
        saved = saved[split]
    yield from saved.with_format(None)
