"""A journal holds the entries before or after an append, whenever the process is killed."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from saebench.core.errors import UserError
from saebench.core.journal import Journal, read_journal

ENTRIES = [{"work": "ab" * 32}, {"rows": 3, "text": 'é\n"\u2028'}, {"rows": 7, "files": [None, {"bytes": 1}]}]


def test_entries_are_read_as_they_were_appended(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert read_journal(path) == []
    journal = Journal(path, ENTRIES[:1])
    for number, entry in enumerate(ENTRIES[1:], 2):
        journal.append(entry)
        assert read_journal(path) == ENTRIES[:number]
    journal.close()
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == ENTRIES


def test_every_prefix_of_the_file_resumes_after_its_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, ENTRIES).close()
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        entries = read_journal(path)
        assert entries == ENTRIES[: whole[:size].count(b"\n")]
        journal = Journal(path, entries)
        for entry in ENTRIES[len(entries) :]:
            journal.append(entry)
        journal.close()
        assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", [b'{"rows": \n', b"[1]\n", b"\x00\x00\x00\n", b"\n"])
def test_a_damaged_line_ends_the_journal(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, ENTRIES).close()
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + damage + b"".join(rest))
    assert read_journal(path) == ENTRIES[:1]


def test_an_append_that_the_disk_refuses_leaves_the_entries_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, ENTRIES[:1])
    journal.append(ENTRIES[1])
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="no space left"):
            journal.append(ENTRIES[2])
    assert path.read_bytes() == before
    journal.append(ENTRIES[2])
    journal.close()
    assert read_journal(path) == ENTRIES


@pytest.mark.parametrize(("sync_every", "n_synced"), [(0.0, 5), (3600.0, 0)])
def test_entries_are_synced_as_often_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync_every: float, n_synced: int
) -> None:
    journal = Journal(tmp_path / "journal.jsonl", sync_every=sync_every)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    for number in range(5):
        journal.append({"feature": number})
    journal.close()
    assert len(synced) == n_synced
