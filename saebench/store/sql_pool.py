"""Processes that answer people's SQL: kept for the next query, and killed when a query takes too long."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from saebench.core.errors import UserError
from saebench.store.limits import too_slow
from saebench.store.sql_process import (
    IDLE_SECONDS,
    MOST_BYTES,
    MOST_MESSAGE,
    SQL_MEMORY,
    read_frame,
    write_frames,
)

MOST_PROCESSES = 4
"""Queries of this program that run at the same time; others wait for their turn."""
MOST_IDLE = 2
"""Processes that are kept for the next query, which saves it about half a second."""
START_SECONDS = 60.0
"""For a process to start and to open a store's files."""
KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "LANG", "LC_ALL", "TZ")
"""All that a process sees of the environment: what Python needs to start, and the time zone."""


class SqlProcess:
    """One process of `saebench.store.sql_process`, which does one request after another.

    Attributes:
        usable: whether it can be asked again.
        opening: the last request to open files that it did.
        since: when it ended its last request.
    """

    def __init__(self) -> None:
        folders = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "saebench.store.sql_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**kept, "PYTHONPATH": folders, "PYTHONSAFEPATH": "1"},
            start_new_session=True,
        )
        self.usable, self.since = True, time.monotonic()
        self.opening: dict[str, Any] | None = None

    def ask(self, request: dict[str, Any], values: bytes = b"", *, seconds: float) -> tuple[Any, bytes]:
        """The reply and the rows of ``request``; the process is killed if that takes longer than ``seconds``.

        Raises:
            TimeLimitError: it did.
            UserError: the query was refused or wrong, or needed too much memory.
        """
        reply, data = self._exchange(request, values, seconds)
        self.since = time.monotonic()
        if reply.get("last"):
            self.kill()
        if "bug" in reply:
            raise RuntimeError(reply["bug"])
        if reply.get("memory"):
            raise _too_large()
        if "error" in reply:
            raise UserError(reply["error"])
        return reply, data

    def open(self, opening: dict[str, Any]) -> None:
        """Make the files of ``opening`` those that queries are about."""
        if self.opening != opening:
            self.opening = None
            self.ask({"open": opening}, seconds=START_SECONDS)
            self.opening = opening

    def is_fresh(self) -> bool:
        """Whether it runs, and will not end by itself before it reads the next request."""
        return self._process.poll() is None and time.monotonic() - self.since < IDLE_SECONDS / 2

    def kill(self) -> None:
        self.usable = False
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what it was not sent cannot be sent any more
                stream.close()  # type: ignore[union-attr]

    def _exchange(self, request: dict[str, Any], values: bytes, seconds: float) -> tuple[Any, bytes]:
        process, expired = self._process, threading.Event()
        assert process.stdin and process.stdout

        def stop() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            write_frames(process.stdin, json.dumps(request).encode(), values)
            reply = json.loads(read_frame(process.stdout, 64 * MOST_MESSAGE))
            return reply, read_frame(process.stdout, 2 * MOST_BYTES)
        except (EOFError, BrokenPipeError):
            self.kill()
            if expired.is_set() or process.returncode == -signal.SIGXCPU:
                raise too_slow(seconds) from None
            raise _too_large() from None
        except BaseException:  # an interrupt: its answer would be taken for that of the next query
            self.kill()
            raise
        finally:
            timer.cancel()
            if expired.is_set():
                self.usable = False


def _too_large() -> UserError:
    return UserError(
        f"the query needed more than {SQL_MEMORY} of memory, or made DuckDB fail, and was stopped; "
        "ask for less"
    )


_turns = threading.BoundedSemaphore(MOST_PROCESSES)
_lock = threading.Lock()
_idle: list[SqlProcess] = []


@contextlib.contextmanager
def sql_process(opening: dict[str, Any]) -> Iterator[SqlProcess]:
    """A process to ask about the files of ``opening``; it is kept for the next query while it is usable."""
    with _turns:
        process = _take(opening) or SqlProcess()
        try:
            process.open(opening)
            yield process
        finally:
            _keep(process)


def release(opening: dict[str, Any]) -> None:
    """Let the processes that are kept close the files of ``opening``."""
    with _lock:
        held = [process for process in _idle if process.opening == opening]
        _idle[:] = [process for process in _idle if process not in held]
    for process in held:
        with contextlib.suppress(UserError):
            process.open({"store": "", "files": {}, "search_path": ""})
        _keep(process)


def _take(opening: dict[str, Any]) -> SqlProcess | None:
    """One of the idle processes, best one with these files; None if there is none that is sure to go on."""
    with _lock:
        fresh = [process for process in _idle if process.is_fresh()]
        stale = [process for process in _idle if process not in fresh]
        fresh.sort(key=lambda process: process.opening == opening)
        taken = fresh.pop() if fresh else None
        _idle[:] = fresh
    for process in stale:
        process.kill()
    return taken


def _keep(process: SqlProcess) -> None:
    with _lock:
        kept = process.usable and len(_idle) < MOST_IDLE
        if kept:
            _idle.append(process)
    if not kept:
        process.kill()


def _kill_all() -> None:
    while _idle:
        _idle.pop().kill()


atexit.register(_kill_all)
os.register_at_fork(after_in_child=_idle.clear)  # they answer the program that started them
