"""Journal: a record of finished units of work, from which a process that was killed resumes.

A journal is a file of one JSON object per line, which only grows. `Journal.append` returns when the line is
on the disk, so append an entry after the files that it names are written and synced. A process killed at
any instant leaves the entries before or after an append. A half-written last line is not an entry, nor is
anything that follows a damaged line; that work is done again. What else makes an entry valid, such as the
checksums of the files it names, is checked by the caller, who opens the journal with the valid entries.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from saebench.core.files import SURROGATES, sentence_for_os_errors, write_bytes_atomic
from saebench.core.reading import parse_json, read_bytes

Entry = dict[str, Any]


def read_journal(path: Path) -> list[Entry]:
    """The entries of a journal, up to the first damaged line; empty when there is no file.

    Raises:
        UserError: it is something else than a file, or cannot be read.
    """
    entries: list[Entry] = []
    if not path.exists():
        return entries
    content = read_bytes(path, what="the journal", way_out="delete it and run the command again")
    *lines, _unfinished = content.split(b"\n")
    for line in lines:
        try:
            entry = parse_json(line)
        except ValueError:
            break
        if not isinstance(entry, dict):
            break
        entries.append(entry)
    return entries


class Journal:
    """A journal open for appending; use under the lock of its directory.

    Args:
        entries: what the journal holds at first. They replace the file's content, in one atomic step.
        sync_every: seconds between syncs. An entry of the last seconds may be lost in a power failure (not
            when the process is killed); 0 syncs each entry.

    Raises:
        UserError: the disk is full or refuses the write.
    """

    def __init__(
        self, path: Path, entries: Iterable[Mapping[str, Any]] = (), *, sync_every: float = 0
    ) -> None:
        self.path = path
        self._sync_every = sync_every
        write_bytes_atomic(path, b"".join(map(_line, entries)))
        with sentence_for_os_errors(path):
            self._file: IO[bytes] = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close
        self._synced = time.monotonic()

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add one entry.

        Raises:
            UserError: the disk is full or refuses the write; the journal is as before.
        """
        end = os.fstat(self._file.fileno()).st_size
        rest = _line(entry)
        with sentence_for_os_errors(self.path):
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
                if time.monotonic() - self._synced >= self._sync_every:
                    os.fsync(self._file.fileno())
                    self._synced = time.monotonic()
            except OSError:
                self._file.truncate(end)
                raise

    def close(self) -> None:
        self._file.close()


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False, allow_nan=False).encode("utf-8", SURROGATES) + b"\n"
