"""Progress of long work: a bar with rate and time left on a terminal, lines elsewhere, events for programs.

Work reports to `progress`. People read it on standard error; a program that watches the process, such as the
explorer, reads JSON lines instead, once the process has called `send_events`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import IO, Any, Protocol

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_EVENTS = 0.5


class Progress(Protocol):
    def update(self, amount: int, note: str = "") -> None:
        """Count ``amount`` more units; ``note`` is shown beside the rate."""


@dataclass(frozen=True)
class Snapshot:
    """How far a piece of work is at one moment.

    Attributes:
        label: what is being done.
        done: units done, with those of earlier processes.
        total: units in all; None if it is not known.
        unit: what is counted.
        initial: units done by earlier processes: they count in the share but not in the rate.
        seconds: since this process began the work.
        note: the latest note of the work, such as its loss.
    """

    label: str
    done: int
    total: int | None
    unit: str
    initial: int = 0
    seconds: float = 0.0
    note: str = ""

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return 0.0 if self.total is None else min(self.done / max(self.total, 1), 1.0)

    @property
    def timing(self) -> str:
        """Rate, time so far and time left in words."""
        rate = (self.done - self.initial) / max(self.seconds, 1e-9)
        remaining = (self.total or 0) - self.done
        left = f", {_clock(remaining / rate)} left" if rate and remaining > 0 else ""
        return f"{rate:,.0f} {self.unit}/s, {_clock(self.seconds)} so far{left}"

    def line(self) -> str:
        """For a log."""
        note = f"  {self.note}" if self.note else ""
        if self.total is None:
            return f"{self.label}: {self.done:,} {self.unit}  {self.timing}{note}"
        share = 100 * self.done / max(self.total, 1)
        return f"{self.label}: {self.done:,}/{self.total:,} {self.unit} ({share:.0f}%)  {self.timing}{note}"


class Events:
    """Writes events to ``stream``, one JSON object per line; ``event`` names its kind.

    - ``progress``: the fields of `Snapshot`, at most every half second and at both ends.
    - ``error``: ``message``, a sentence that says what a person must change.
    - ``result``: the result of the work; its fields depend on the work.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def send(self, event: str, **fields: Any) -> None:
        self._stream.write(json.dumps({"event": event, **fields}) + "\n")
        self._stream.flush()


_events: Events | None = None


def send_events(stream: IO[str]) -> Events:
    """From now on, progress of this process is written to ``stream`` as events and not shown to people."""
    global _events
    _events = Events(stream)
    return _events


@contextlib.contextmanager
def progress(
    title: str, *, total: int | None, unit: str, initial: int = 0, quiet: bool = False
) -> Iterator[Progress]:
    """Show how far a long piece of work is, on standard error; ``quiet`` work shows nothing to people.

    ``initial`` units were done by an earlier run: they count in the share but not in the rate. A ``total``
    of None is not known.
    """
    if _events is not None:
        reports = _EventReports(_events, title, total, unit, initial)
        yield reports
        reports.finish()
    elif quiet:
        yield _Silent()
    elif sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, initial=initial, desc=title, unit=unit, unit_scale=True) as bar:
            yield _Bar(bar)
    else:
        lines = _Lines(title, total, unit, initial)
        yield lines
        lines.finish()


class _Silent:
    def update(self, amount: int, note: str = "") -> None:
        pass


class _Bar:
    def __init__(self, bar) -> None:  # type: ignore[no-untyped-def]
        self._bar = bar

    def update(self, amount: int, note: str = "") -> None:
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(amount)


class _Lines:
    """A line at intervals, and one at the end."""

    def __init__(self, title: str, total: int | None, unit: str, initial: int) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._initial = self._done = initial
        self._started = self._last = time.monotonic()
        self._note = ""

    def update(self, amount: int, note: str = "") -> None:
        self._done += amount
        self._note = note or self._note
        if time.monotonic() - self._last >= self._interval():
            self._report()

    def finish(self) -> None:
        self._report()

    def _report(self) -> None:
        self._last = time.monotonic()
        self._write(
            Snapshot(
                self._title, self._done, self._total, self._unit, self._initial,
                self._last - self._started, self._note,
            )
        )  # fmt: skip

    def _interval(self) -> float:
        return SECONDS_BETWEEN_LINES

    def _write(self, snapshot: Snapshot) -> None:
        print(snapshot.line(), file=sys.stderr, flush=True)


class _EventReports(_Lines):
    """The same as events, with one at the beginning."""

    def __init__(self, events: Events, title: str, total: int | None, unit: str, initial: int) -> None:
        super().__init__(title, total, unit, initial)
        self._events = events
        self._report()

    def _interval(self) -> float:
        return SECONDS_BETWEEN_EVENTS

    def _write(self, snapshot: Snapshot) -> None:
        self._events.send("progress", **asdict(snapshot))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
