"""Jobs: long work in processes beside the server, with progress, which can be stopped.

A page names a ``Task``. Its process writes one folder, a ``Found``, into the cache of this machine, under the
hash of what the result depends on: the same task in another session, or after a restart, finds it there. The
server stays free for the pages, and the memory of the job is freed when it ends.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import streamlit as st

from saebench.assets import cache_dir
from saebench.core.files import sha256_json
from saebench.core.progress import Snapshot
from saebench.core.reading import read_json
from saebench_app.access import refuse_if_read_only

if TYPE_CHECKING:
    import pandas as pd

FACTS = "facts.json"
STOP_SECONDS = 5.0
TAIL_BYTES = 65_536

State = Literal["running", "done", "failed", "stopped"]
Kind = Literal["check", "match", "map", "explain"]


@dataclass(frozen=True)
class Task:
    """``arguments`` are those of the function in worker.py; ``identity`` says what its result depends on."""

    kind: Kind
    arguments: Mapping[str, Any]
    identity: tuple[Any, ...]

    @property
    def key(self) -> str:
        return f"{self.kind}-{sha256_json([self.kind, list(self.identity)])[:24]}"

    @property
    def folder(self) -> Path:
        """Where its result is, once it is done."""
        return cache_dir() / "explorer" / self.key


@dataclass(frozen=True)
class Found:
    """The result of a task: facts, and tables by name."""

    facts: dict[str, Any]
    tables: dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Progress:
    """``share`` is None before the job has sent its total."""

    share: float | None
    text: str


@dataclass
class Work:
    """One process that does a task."""

    process: subprocess.Popen[bytes]
    events: IO[bytes]
    """What it sends (`saebench.core.progress.Events`)."""
    log: IO[bytes]
    """What it and its libraries write to standard error."""
    started: float = field(default_factory=time.monotonic)
    stopped: bool = False

    def state(self) -> State:
        code = self.process.poll()
        if code is None:
            return "running"
        if self.stopped and code != 0:
            return "stopped"
        return "done" if code == 0 else "failed"

    def progress(self) -> Progress:
        """How far it is, by the last progress that it sent."""
        fields = self._last("progress")
        if fields is None:
            return Progress(None, f"{time.monotonic() - self.started:.0f} s so far")
        now = Snapshot(**fields)
        return Progress(now.share, f"{now.done:,} of {now.total:,} {now.unit}, {now.timing}")

    def result(self) -> dict[str, Any]:
        """The fields of its result event; empty before it is done."""
        return self._last("result") or {}

    def error_message(self) -> str:
        """Why it failed, in a sentence."""
        error = self._last("error")
        if error is not None:
            sentence = str(error["message"])
            return sentence[:1].upper() + sentence[1:].rstrip(".") + "."
        lines = _last_lines(self.log)
        return f"The job ended with an error ({lines[-1] if lines else 'it was killed'})."

    def stop(self) -> None:
        """Interrupt it, so that it keeps what is finished; kill it after a while."""
        self.stopped = True
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _last(self, kind: str) -> dict[str, Any] | None:
        """The fields of the latest event of this kind."""
        for line in reversed(_last_lines(self.events)):
            with contextlib.suppress(ValueError):  # a line that is being written, or was cut
                fields: dict[str, Any] = json.loads(line)
                if fields.pop("event") == kind:
                    return fields
        return None


def _last_lines(file: IO[bytes]) -> list[str]:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - TAIL_BYTES, 0))
    return [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]


def weights(info: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``FeatureStore.info`` by which a worker finds the weights."""
    return {name: info[name] for name in ("name", "d_sae", "sae_hash")}


@st.cache_resource(show_spinner=False)
def _works() -> dict[str, Work]:
    """All jobs of this server, by the key of their task."""
    return {}


def work_on(task: Task) -> Work | None:
    """The latest job of a task, if there was one since the server started."""
    return _works().get(task.key)


def start(task: Task) -> None:
    """Start a task, unless it is running.

    Raises:
        UserError: the explorer is read-only.
    """
    refuse_if_read_only("jobs")
    works = _works()
    if (work := works.get(task.key)) and work.state() == "running":
        return
    # Both files are read as long as the work is remembered.
    events, log = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
    command = [sys.executable, "-m", "saebench_app.worker", str(os.getpid()), task.kind]
    command += [json.dumps(dict(task.arguments)), str(task.folder)]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=events, stderr=log, start_new_session=True
    )
    works[task.key] = Work(process, events, log)


def found(task: Task) -> Found | None:
    """The result of a task; None when there is none, or it cannot be read."""
    with contextlib.suppress(OSError, ValueError):  # pyarrow raises ValueError for a damaged file
        return _read(str(task.folder), (task.folder / FACTS).stat().st_mtime_ns)
    return None


@st.cache_data(max_entries=16, show_spinner=False)
def _read(folder: str, changed: int) -> Found:
    import pandas as pd

    path = Path(folder)
    facts = read_json(path / FACTS, what="the result")
    return Found(facts, {file.stem: pd.read_parquet(file) for file in sorted(path.glob("*.parquet"))})


def stop_all() -> None:
    for work in _works().values():
        work.stop()


atexit.register(stop_all)
