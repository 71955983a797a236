"""Documents for harvesting, from built-in texts, files and data sets; which of them are held out."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saebench.core.errors import UserError
from saebench.core.files import sha256_file

HELD_OUT_ONE_IN = 20
SECTION_CHARACTERS = 4_000

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class Document:
    """One document. ``label`` is shown to people ("1862 Abraham Lincoln (Republican)"), or ''."""

    text: str
    label: str = ""


def is_held_out(text: str) -> bool:
    """True for about one document in 20; neither the demo model nor an SAE is trained on these.

    The choice depends only on a hash of the document's bytes, so it is the same in every cache, on every
    machine and for every order of the documents: the first 8 bytes of the SHA-256 of the UTF-8 text, as a
    big-endian integer, are divisible by 20.
    """
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def read_documents(name: str, *, column: str = "text", split: str = "train") -> Iterator[Document]:
    """Iterate over the documents of a text in a fixed order, reading them when they are needed.

    ``name`` is one of

    - 'sotu': State of the Union addresses, shuffled by hash, so that the first few are a sample;
    - a local .jsonl, .json, .parquet or .csv file: one document per row, in ``column``;
    - any other local file: plain UTF-8 text, cut at blank lines into documents of at least 4,000 characters
      (a document is held out as a whole, so a text needs several);
    - a local folder that `datasets` reads, or the hub name of a data set: its ``split``, streamed.

    A column ``label`` or ``title`` gives the label. Documents of white space only are left out.

    Raises:
        UserError: no such file, data set, split or column; a value that is not a string; or no document. A
            missing file is reported at once, all else while reading.
    """
    from saebench.assets import resolve_text

    source = resolve_text(name)
    documents: Iterable[Document]
    if name == "sotu":
        documents = _shuffled(_labeled_addresses(_rows(source, name, split)))
    elif _is_plain_text(source):
        documents = _cut_at_blank_lines(Path(source))
    else:
        documents = _documents(_rows(source, name, split), name, column)
    return _non_empty(documents, name)


def text_fingerprint(name: str, *, column: str = "text", split: str = "train") -> dict[str, Any]:
    """What a manifest records of a text: its name, and the SHA-256 of its file or its revision on the hub."""
    from saebench.assets import resolve_text

    source = resolve_text(name)
    where: dict[str, Any] = {"name": name}
    if name == "sotu" or _is_plain_text(source):
        return {**where, "sha256": sha256_file(Path(source))}
    if isinstance(source, Path) and source.is_file():
        return {**where, "sha256": sha256_file(source), "column": column}
    where |= {"column": column, "split": split}
    if isinstance(source, Path):
        files = sorted(path for path in source.rglob("*") if path.is_file())
        sums = {path.relative_to(source).as_posix(): sha256_file(path) for path in files}
        return {**where, "sha256": sums}
    return {**where, "revision": _hub_revision(source)}


def _is_plain_text(source: Path | str) -> bool:
    return isinstance(source, Path) and source.is_file() and source.suffix not in _READERS


def _rows(source: Path | str, name: str, split: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a data set, streamed: `datasets` keeps no copy on disk."""
    import datasets

    try:
        if isinstance(source, Path) and source.is_file():
            reader = _READERS[source.suffix]
            rows = datasets.load_dataset(reader, data_files=str(source), split="train", streaming=True)
        elif isinstance(source, Path):
            rows = datasets.load_dataset(str(source), split=split, streaming=True)
        else:
            rows = datasets.load_dataset(source, split=split, streaming=True, revision=_hub_revision(source))
        yield from rows
    except UserError:
        raise
    except Exception as error:  # `datasets` raises many kinds
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--text {name} cannot be read as a data set ({reason}); check the file or name"
        ) from None


def _hub_revision(name: str) -> str:
    """The current commit of a data set on the hub."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return str(HfApi().dataset_info(name).sha)
    except GatedRepoError:
        raise UserError(
            f"access to --text {name} is restricted; request it on the hub and log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"--text {name} is neither a local file nor a data set on the hub; check the name"
        ) from None
    except Exception as error:  # no network, a refusal, an invalid name: the hub's client raises many kinds
        reason = type(error).__name__
        raise UserError(
            f"--text {name} is not a local file, and the hub cannot be reached ({reason}); check the "
            "name and the network, or use --text sotu"
        ) from None


def _documents(rows: Iterator[Mapping[str, Any]], name: str, column: str) -> Iterator[Document]:
    for i, row in enumerate(rows):
        if column not in row:
            raise UserError(
                f"--text {name} has no column {column!r}; pass --column with one of {', '.join(row)}"
            )
        text = row[column]
        if not isinstance(text, str):
            kind = type(text).__name__
            raise UserError(
                f"--text {name}: row {i}, column {column!r} is {kind}, not text; pass another --column"
            )
        label = row.get("label") or row.get("title")
        yield Document(text, label if isinstance(label, str) else "")


def _labeled_addresses(rows: Iterator[Mapping[str, Any]]) -> Iterator[Document]:
    for row in rows:
        yield Document(row["text"], f"{row['year']} {row['president']} ({row['party']})")


def _shuffled(documents: Iterable[Document]) -> list[Document]:
    """Shuffled by hash, with held-out documents at even distances, so that the first few contain some."""
    shuffled = sorted(documents, key=lambda document: hashlib.sha256(document.text.encode()).digest()[8:])
    groups: dict[bool, list[Document]] = {True: [], False: []}
    for document in shuffled:
        groups[is_held_out(document.text)].append(document)
    placed = [
        ((i + (0.2 if held_out else 0.5)) / len(group), document)
        for held_out, group in groups.items()
        for i, document in enumerate(group)
    ]
    return [document for _, document in sorted(placed, key=lambda pair: pair[0])]


def _cut_at_blank_lines(path: Path) -> Iterator[Document]:
    """Documents of a plain text file, cut at the first blank line after ``SECTION_CHARACTERS`` characters."""
    numbers = itertools.count(1)
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines: list[str] = []
            size = 0
            for line in file:
                lines.append(line)
                size += len(line)
                if size >= SECTION_CHARACTERS and not line.strip():
                    yield Document("".join(lines), f"{path.name} {next(numbers)}")
                    lines, size = [], 0
            yield Document("".join(lines), f"{path.name} {next(numbers)}")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (invalid byte {error.object[error.start]:#04x}); convert it to UTF-8"
        ) from None


def _non_empty(documents: Iterable[Document], name: str) -> Iterator[Document]:
    found = False
    for document in documents:
        if document.text.strip():
            found = True
            yield document
    if not found:
        raise UserError(f"--text {name} has no document with text in it; give a text that is not empty")
