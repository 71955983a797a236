"""The course of a training, read from its run directory, also while the training goes on."""

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
    """The lines of a run's metrics.jsonl; each ``update`` reads only what was written since the last one.

    Attributes:
        directory: the run.
        lines: one dict a reported step, in the order of steps.
    """

    def __init__(self, directory: str | PathLike[str]) -> None:
        self.directory = Path(directory)
        self.lines: list[dict[str, Any]] = []
        self._read = 0
        self._identity: tuple[int, int] | None = None

    def update(self) -> int:
        """Read on; the number of new lines. A line that is being written waits for the next call.

        A resumed training may have cut lines off or written the file anew: then all of it is read again.

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
        """A row for each reported step, a column for each number."""
        import pandas as pd

        return pd.DataFrame(self.lines)


def read_metrics(directory: str | PathLike[str]) -> pd.DataFrame:
    """All metrics of a run: a row for each reported step, a column for each number.

    Raises:
        UserError: no metrics, or none yet.
    """
    course = MetricsLog(directory)
    course.update()
    if not course.lines:
        raise UserError(
            f"{course.directory / METRICS_FILE} has no line yet; wait for the training's first report"
        )
    return course.frame()


def read_sessions(directory: str | PathLike[str]) -> list[dict[str, Any]]:
    """The processes that worked on a run, oldest first; empty until the first one has ended.

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
