"""Reading a run's metrics and sessions, also while the training is running."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.core.errors import UserError
from saebench.core.reading import check_shape, open_file, parse_json, read_text
from saebench.core.shapes import Count, Number, Shape, Text
from saebench.runs.layout import METRICS_FILE, SESSIONS_FILE

if TYPE_CHECKING:
    import pandas as pd


class _Session(Shape):
    first_step: Count = 0
    last_step: Count = 0
    seconds: Number = 0
    tokens_per_second: Number = 0
    device: Text = ""
    torch: Text = ""
    kernels: Text = ""


def metrics_of(line: bytes | str) -> dict[str, Any] | None:
    """The metrics of one line of metrics.jsonl, or None if it is damaged.

    ``step`` is a whole number, and every other value a number or None.
    """
    try:
        found = parse_json(line, nonfinite=True)
        if not isinstance(found, dict) or type(found.get("step")) is not int:
            return None
        for name, value in found.items():
            if not name.isprintable() or isinstance(value, str):
                return None
            float(value or 0)
    except (ValueError, TypeError, OverflowError):
        return None
    return found if 0 <= found["step"] < 2**63 else None


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
        if not path.exists():
            raise UserError(f"{self.directory} has no {METRICS_FILE}; name a run directory of saebench train")
        try:
            with open_file(path, what="the metrics") as file:
                status = os.fstat(file.fileno())
                identity = (status.st_dev, status.st_ino)
                if identity != self._identity or status.st_size < self._read:
                    self.lines, self._read, self._identity = [], 0, identity
                file.seek(self._read)
                text = file.read()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); check the path") from None
        before = len(self.lines)
        for line in text[: text.rfind(b"\n") + 1].splitlines(keepends=True):
            self._read += len(line)
            if (found := metrics_of(line)) is not None:
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

    Keys first_step, last_step, seconds, tokens_per_second, device, torch, kernels. Damaged lines are left
    out.
    """
    found: list[dict[str, Any]] = []
    try:
        text = read_text(Path(directory) / SESSIONS_FILE, what="the sessions")
    except UserError:
        return found
    for line in text.splitlines():
        try:
            session = parse_json(line)
            check_shape(session, _Session, source="the session")
        except ValueError:
            continue
        found.append(session)
    return found
