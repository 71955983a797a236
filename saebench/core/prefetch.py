"""Prefetching: a thread computes the next items of an iterable while the current one is used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")

_POLL_SECONDS = 0.1


def prefetch(items: Iterable[ItemT], depth: int) -> Generator[ItemT, None, None]:
    """Yield ``items`` in order while a thread computes up to ``depth`` of them in advance.

    An exception in the thread is raised here, after the items that precede it. Closing the generator ends the
    thread; leaving a ``for`` loop early closes it when the generator is garbage collected. With depth 0 there
    is no thread.
    """
    if depth == 0:
        yield from items
        return
    worker = _Worker(items, depth)
    try:
        yield from worker
    finally:
        worker.stop()


class _Worker(Generic[ItemT]):
    def __init__(self, items: Iterable[ItemT], depth: int) -> None:
        self._items = items
        self._queue: queue.Queue[tuple[str, ItemT | BaseException | None]] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="work-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[ItemT]:
        while True:
            kind, value = self._queue.get()
            if kind == "end":
                return
            if kind == "error":
                assert isinstance(value, BaseException)
                raise value
            yield value  # type: ignore[misc]

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put(("item", item)):
                    break
                del item  # the queue holds it; keep no reference while the next one is computed
            self._put(("end", None))
        except BaseException as error:
            self._put(("error", error))
        finally:
            if hasattr(self._items, "close"):
                self._items.close()

    def _put(self, entry: tuple[str, ItemT | BaseException | None]) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(entry, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False
