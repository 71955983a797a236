"""Processes that end with the one that started them, also when that was killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

SECONDS_TO_END = 10.0


def end_after(wait: Callable[[], object], by: signal.Signals) -> None:
    """Send this process the signal ``by`` once ``wait``, in a thread, has returned; kill it after a while."""

    def end() -> None:
        wait()
        os.kill(os.getpid(), by)
        time.sleep(SECONDS_TO_END)
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def until_closed(pipe: int) -> None:
    """Return when no process has the other end of ``pipe`` open any more."""
    while os.read(pipe, 4096):
        pass


def until_orphaned(parent: int, seconds: float) -> None:
    """Return when this process is no child of ``parent`` any more, which is looked up every ``seconds``."""
    while os.getppid() == parent:
        time.sleep(seconds)
