"""Reading a run's metrics and sessions, also while the training is running."""

from __future__ import annotations

import json
import os
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.core.errors import UserError
from saebench.runs.layout import METRICS_FILE, SESSIONS_FILE

if TYPE_CHECKING:
    import pandas as pd


class MetricsLog:
    """The lines of a run's metrics.jsonl; each ``update`` reads only the lines added since the last one.

    Attributes:
        directory: the run directory.
        lines: one dict per logged step, in the order of steps.
    """

    def __init__(self, directory: str | PathLike[str]) -> None:
        self.directory = Path(directory)
        self.lines: list[dict[str, Any]] = []
        self._read = 0
        self._identity: tuple[int, int] | None = None

    def update(self) -> int:
        """Read new lines and return their number. An unfinished last line is read by a later call.

        If a resumed training shortened or replaced the file, the whole file is read again.

        Raises:
            UserError: there is no metrics.jsonl.
        """
        path = self.directory / METRICS_FILE
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                identity = (status.st_dev, status.st_ino)
                if identity != self._identity or status.st_size < self._read:
                    self.lines, self._read, self._identity = [], 0, identity
                file.seek(self._read)
                text = file.read()
        except OSError:
            raise UserError(
                f"{self.directory} has no {METRICS_FILE}; name a run directory of saebench train"
            ) from None
        before = len(self.lines)
        for line in text[: text.rfind(b"\n") + 1].splitlines(keepends=True):
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            self._read += len(line)
            if isinstance(found, dict):
                self.lines.append(found)
        return len(self.lines) - before

    def frame(self) -> pd.DataFrame:
        """One row per logged step, one column per metric."""
        import pandas as pd

        return pd.DataFrame(self.lines)


def read_metrics(directory: str | PathLike[str]) -> pd.DataFrame:
    """All metrics of a run: one row per logged step, one column per metric.

    Raises:
        UserError: the run has no metrics.jsonl, or the file is still empty.
    """
    log = MetricsLog(directory)
    log.update()
    if not log.lines:
        raise UserError(f"{log.directory / METRICS_FILE} has no line yet; wait for the first logged step")
    return log.frame()


def read_sessions(directory: str | PathLike[str]) -> list[dict[str, Any]]:
    """The processes that trained a run, oldest first; empty until the first one has ended.

    Keys first_step, last_step, seconds, tokens_per_second, device, torch, kernels.
    """
    try:
        text = (Path(directory) / SESSIONS_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    found = []
    for line in text.splitlines():
        try:
            session = json.loads(line)
        except ValueError:
            continue
        if isinstance(session, dict):
            found.append(session)
    return found
