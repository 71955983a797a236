"""One progress display: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol

SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    def update(self, amount: int, note: str = "") -> None:
        """Count ``amount`` more units; ``note`` is shown beside the rate."""


@contextlib.contextmanager
def progress(
    title: str, *, total: int, unit: str, initial: int = 0, quiet: bool = False
) -> Iterator[Progress]:
    """Show how far a long piece of work is, on standard error.

    ``initial`` units were done by an earlier run: they count in the share but not in the rate.
    """
    if quiet:
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
    def __init__(self, title: str, total: int, unit: str, initial: int) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._initial = self._done = initial
        self._started = self._last = time.monotonic()
        self._note = ""

    def update(self, amount: int, note: str = "") -> None:
        self._done += amount
        self._note = note or self._note
        if time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._print()

    def finish(self) -> None:
        self._print()

    def _print(self) -> None:
        self._last = time.monotonic()
        seconds = max(self._last - self._started, 1e-9)
        rate = (self._done - self._initial) / seconds
        remaining = self._total - self._done
        left = f", {_clock(remaining / rate)} left" if rate and remaining > 0 else ""
        share = 100 * self._done / max(self._total, 1)
        note = f"  {self._note}" if self._note else ""
        print(
            f"{self._title}: {self._done:,}/{self._total:,} {self._unit} ({share:.0f}%)  "
            f"{rate:,.0f} {self._unit}/s, {_clock(seconds)} so far{left}{note}",
            file=sys.stderr,
            flush=True,
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
