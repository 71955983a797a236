"""Long work beside the server: processes of our own, with progress, which can be stopped.

A page names a ``Task``. Its process writes one folder, a ``Found``, into the cache of this machine, under a
name that is a hash of what it was made of: who asks for the same again, in any session or after a restart,
gets what is there. The server itself stays free for the pages, and the memory of the work goes with it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import shutil
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
from saebench.core.errors import UserError
from saebench.core.files import read_json, sha256_json

if TYPE_CHECKING:
    import pandas as pd

FACTS = "facts.json"
STOP_SECONDS = 5.0
TAIL_BYTES = 4096
_LINE = re.compile(r"(?P<title>[\w -]+): (?P<done>[\d,]+)/(?P<total>[\d,]+) (?P<rest>.*)")

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
    """What a task found: facts, and tables by name."""

    facts: dict[str, Any]
    tables: dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Progress:
    """``share`` is None before the work has said how much there is."""

    share: float | None
    text: str


@dataclass
class Work:
    """One process that works on a task."""

    process: subprocess.Popen[bytes]
    log: IO[bytes]
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
        """How far it is, by its last line of progress."""
        for line in reversed(self._lines()):
            if found := _LINE.fullmatch(line):
                done, total = (int(found[name].replace(",", "")) for name in ("done", "total"))
                return Progress(
                    min(done / max(total, 1), 1.0), f"{found['done']} of {found['total']} {found['rest']}"
                )
        return Progress(None, f"{time.monotonic() - self.started:.0f} s so far")

    def error_message(self) -> str:
        """Why it failed, in a sentence."""
        lines = self._lines()
        for line in reversed(lines):
            if line.startswith("saebench: "):
                sentence = line.removeprefix("saebench: ")
                return sentence[:1].upper() + sentence[1:].rstrip(".") + "."
        return f"The work ended with an error ({lines[-1] if lines else 'it was killed'})."

    def stop(self) -> None:
        """Ask it to end, which keeps what is finished; after a while, end it."""
        self.stopped = True
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _lines(self) -> list[str]:
        size = self.log.seek(0, 2)
        self.log.seek(max(size - TAIL_BYTES, 0))
        return [
            line.strip() for line in self.log.read().decode("utf-8", "replace").splitlines() if line.strip()
        ]


def weights(info: Mapping[str, Any]) -> dict[str, Any]:
    """What of ``FeatureStore.info`` tells a worker whose weights it needs."""
    return {name: info[name] for name in ("name", "d_sae", "sae_hash")}


@st.cache_resource(show_spinner=False)
def _works() -> dict[str, Work]:
    """All work of this server, by the key of its task."""
    return {}


def work_on(task: Task) -> Work | None:
    """The latest work on a task, if there was any since the server began."""
    return _works().get(task.key)


def start(task: Task) -> None:
    """Begin the work on a task, unless it is going on."""
    works = _works()
    if (work := works.get(task.key)) and work.state() == "running":
        return
    log = tempfile.TemporaryFile()  # noqa: SIM115 - it is read as long as the work is remembered
    line = [
        sys.executable, "-m", "saebench_app.worker", str(os.getpid()), task.kind,
        json.dumps(dict(task.arguments)), str(task.folder),
    ]  # fmt: skip
    process = subprocess.Popen(
        line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
    )
    works[task.key] = Work(process, log)


def forget(task: Task) -> None:
    """Take away what was found, so that the page asks anew."""
    _works().pop(task.key, None)
    shutil.rmtree(task.folder, ignore_errors=True)


def found(task: Task) -> Found | None:
    """The result of a task; None when there is none, or it cannot be read."""
    with contextlib.suppress(OSError, UserError):
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
