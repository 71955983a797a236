"""The journal of finished features, in the store's directory, from which a killed explanation resumes."""

from __future__ import annotations

import contextlib
import functools
import shutil
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, create_model

from saebench.core.errors import UserError
from saebench.core.files import directory_lock, sha256_json
from saebench.core.journal import Journal, read_journal
from saebench.core.reading import check_shape
from saebench.core.shapes import Number, Shape, Text
from saebench.store.explanation_tables import KEY
from saebench.store.schema import EXPL_ITEM, EXPL_SCORE, EXPLANATION, Table

WORK = ".explain"
SECONDS_BETWEEN_SYNCS = 2.0


class FinishedFeatures:
    """The records of finished features, of earlier runs too: ``done`` is feature -> record (tables.py)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / "finished.jsonl"
        records = [record for record in read_journal(path) if _is_whole(record)]
        self.done: dict[int, dict[str, Any]] = {record["feature"]: record for record in records}
        self._journal = Journal(path, self.done.values(), sync_every=SECONDS_BETWEEN_SYNCS)

    def add(self, record: dict[str, Any]) -> None:
        self._journal.append(record)
        self.done[int(record["feature"])] = record

    def close(self) -> None:
        self._journal.close()


_KINDS: dict[str, Any] = {
    "UINTEGER": Annotated[int, Field(ge=0, lt=2**32)],
    "BIGINT": Annotated[int, Field(ge=-(2**63), lt=2**63)],
    "VARCHAR": Text | None,
    "DOUBLE": Number | None,
    "BOOLEAN": bool | None,
    "UINTEGER[]": list[Annotated[int, Field(ge=0, lt=2**32)]] | None,
}


@functools.cache
def _record() -> type[Shape]:
    """A record has the columns of an explanation, and its scores and items those of their tables."""
    key = set(KEY)

    def kinds(table: Table, names: set[str]) -> dict[str, Any]:
        return {c.name: (_KINDS[c.type], ...) for c in table.columns if c.name in names}

    score = create_model("Score", __base__=Shape, **kinds(EXPL_SCORE, {*EXPL_SCORE.names} - key))
    item = create_model("Item", __base__=Shape, **kinds(EXPL_ITEM, {*EXPL_ITEM.names} - key))
    own = kinds(EXPLANATION, {*EXPLANATION.names})
    lists: dict[str, Any] = {
        "scores": (types.GenericAlias(list, score), ...),
        "items": (types.GenericAlias(list, item), ...),
    }
    made: type[Shape] = create_model("Record", __base__=Shape, **lists, **own)
    return made


def _is_whole(record: dict[str, Any]) -> bool:
    try:
        check_shape(record, _record(), source="the record")
    except UserError:
        return False
    return True


@contextlib.contextmanager
def open_finished(store: Path, identity: object) -> Iterator[FinishedFeatures]:
    """The journal of the work that ``identity`` (JSON) describes; other work has another journal.

    Raises:
        UserError: another process does the same work, or the disk is full or refuses the write.
    """
    directory = store / WORK / sha256_json(identity)[:16]
    with (
        directory_lock(directory, what="the unfinished explanations"),
        contextlib.closing(FinishedFeatures(directory)) as finished,
    ):
        yield finished


def discard(finished: FinishedFeatures) -> None:
    """Remove the journal of features that are published."""
    shutil.rmtree(finished.directory, ignore_errors=True)
    with contextlib.suppress(OSError):
        finished.directory.parent.rmdir()
