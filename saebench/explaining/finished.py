"""The journal of finished features, in the store's directory, from which a killed explanation resumes."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saebench.core.files import directory_lock, sha256_json
from saebench.core.journal import Journal, read_journal

WORK = ".explain"
SECONDS_BETWEEN_SYNCS = 2.0


class FinishedFeatures:
    """The records of finished features, of earlier runs too: ``done`` is feature -> record (tables.py)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / "finished.jsonl"
        records = [record for record in read_journal(path) if isinstance(record.get("feature"), int)]
        self.done: dict[int, dict[str, Any]] = {record["feature"]: record for record in records}
        self._journal = Journal(path, self.done.values(), sync_every=SECONDS_BETWEEN_SYNCS)

    def add(self, record: dict[str, Any]) -> None:
        self._journal.append(record)
        self.done[int(record["feature"])] = record

    def close(self) -> None:
        self._journal.close()


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
