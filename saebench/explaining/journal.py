"""What is finished of a long explanation: a journal in the store, from which a killed one goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from saebench.core.files import directory_lock, sentence_for_os_errors, sha256_json

WORK = ".explain"
SECONDS_BETWEEN_SYNCS = 2.0


class Journal:
    """One JSON object a line, one line a finished feature; ``done`` has what earlier runs finished.

    A line that a killed process left half written is dropped.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "finished.jsonl"
        self.done: dict[int, dict[str, Any]] = {}
        whole = 0
        if self.path.exists():
            for line in self.path.read_bytes().splitlines(keepends=True):
                try:
                    record = json.loads(line)
                    assert line.endswith(b"\n")
                    self.done[int(record["feature"])] = record
                except (ValueError, KeyError, TypeError, AssertionError):
                    break
                whole += len(line)
        with sentence_for_os_errors(self.path):
            self._file: IO[bytes] = open(self.path, "ab")  # noqa: SIM115 - closed with the journal
            self._file.truncate(whole)
        self._synced = time.monotonic()

    def add(self, record: dict[str, Any]) -> None:
        with sentence_for_os_errors(self.path):
            self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            self._file.flush()
            if time.monotonic() - self._synced > SECONDS_BETWEEN_SYNCS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        self.done[int(record["feature"])] = record

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def open_journal(store: Path, identity: object) -> Iterator[Journal]:
    """The journal of the work that ``identity`` (JSON) describes; work on anything else has another.

    Raises:
        UserError: another process does the same work, or the disk refuses.
    """
    directory = store / WORK / sha256_json(identity)[:16]
    with directory_lock(directory, what="the unfinished explanations"):
        journal = Journal(directory)
        try:
            yield journal
        finally:
            journal.close()


def discard(journal: Journal) -> None:
    """Remove a journal whose content is published."""
    shutil.rmtree(journal.directory, ignore_errors=True)
    with contextlib.suppress(OSError):
        journal.directory.parent.rmdir()
