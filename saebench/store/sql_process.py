"""The process that answers people's SQL, limited by the operating system; `saebench.store.sql` starts it.

It reads requests from standard input and writes answers to standard output, in frames of a length and as many
bytes. It ends when its input ends, so that none is left after the program that started it was killed. What it
may use is set before the first query and can only be lowered:

- memory: ``RLIMIT_AS``. Where the system does not keep to that limit (macOS), a thread ends the process.
- processor time: ``RLIMIT_CPU``, for the case that nobody is left to stop it when its time is over.
- files: ``RLIMIT_FSIZE`` 0, so it cannot write any, and no core files.
"""

from __future__ import annotations

import io
import json
import os
import queue
import resource
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from saebench.core.errors import UserError
from saebench.store.database import (
    CORRUPT,
    attach,
    damaged,
    first_line,
    lock_down,
    memory_instance,
    n_threads,
)
from saebench.store.sql_rules import SqlRules

if TYPE_CHECKING:
    import duckdb

SQL_MEMORY = "1GiB"
"""For DuckDB, which gives a good message when it needs more."""
SPARE_BYTES = (1024 + 256) * 2**20
"""For the process, beyond what it has when it starts: DuckDB's memory, and what DuckDB does not count."""
MOST_BYTES = 128 * 2**20
"""Of one answer."""
MOST_MESSAGE = 1000
IDLE_SECONDS = 60.0
"""After which a process that nobody asks ends."""
OUT_OF_MEMORY = 3
"""Exit status of a process that needed too much, where the system has no limit."""
BATCH = 2048


def write_frames(file: IO[bytes], *frames: bytes) -> None:
    for frame in frames:
        file.write(len(frame).to_bytes(8, "big"))
        file.write(frame)
    file.flush()


def read_frame(file: IO[bytes], most: int) -> bytes:
    """The next frame.

    Raises:
        EOFError: the other side has ended.
    """
    size = int.from_bytes(_exactly(file, 8), "big")
    if size > most:
        raise EOFError(f"a frame of {size:,} bytes, more than {most:,}")
    return _exactly(file, size)


def _exactly(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise EOFError
    return data


def main() -> None:
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is not an answer
    waiting: queue.Queue[tuple[dict[str, Any], bytes]] = queue.Queue()
    import duckdb  # noqa: F401 - before the limits, which count what is loaded
    import pyarrow  # noqa: F401

    limit_resources()
    threading.Thread(target=_listen, args=(requests, waiting), daemon=True).start()
    console = Console()
    while True:
        try:
            request, values = waiting.get(timeout=IDLE_SECONDS)
        except queue.Empty:
            return
        reply, rows = console.answer(request, values)
        write_frames(answers, json.dumps(reply).encode(), rows)


def _listen(requests: IO[bytes], waiting: queue.Queue[tuple[dict[str, Any], bytes]]) -> None:
    """Pass on requests, also during a query; end the process when there will be no more."""
    try:
        while True:
            request = json.loads(read_frame(requests, sys.maxsize))
            waiting.put((request, read_frame(requests, sys.maxsize)))
    except (EOFError, ValueError):
        os._exit(0)


def limit_resources() -> None:
    """Set the limits that hold for all queries."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + SPARE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    except (OSError, ValueError):
        threading.Thread(target=_watch_memory, args=(_peak() + SPARE_BYTES,), daemon=True).start()


def limit_processor_time(seconds: float) -> None:
    """Let the process use all its threads for ``seconds`` from now, and a little more."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = int(used.ru_utime + used.ru_stime + n_threads() * seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _peak() -> int:
    """The largest resident memory so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _watch_memory(most: int) -> None:
    while _peak() < most:
        time.sleep(0.02)
    os._exit(OUT_OF_MEMORY)


class Console:
    """The files that the queries are about, attached to a DuckDB instance of their own."""

    def __init__(self) -> None:
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._rules = SqlRules()
        self._store = Path()
        self._search_path = ""

    def answer(self, request: dict[str, Any], values: bytes) -> tuple[dict[str, Any], bytes]:
        """``(reply, rows)``: what went wrong, or whether there are more rows and an Arrow stream of them.

        After a reply with "last", the process should not be asked again.
        """
        import duckdb
        import pyarrow

        try:
            if "open" in request:
                self._open(**request["open"])
                return {}, b""
            limit_processor_time(request["seconds"])
            return self._rows(request["query"], values, request["limit"])
        except UserError as error:
            return {"error": str(error)}, b""
        except MemoryError:
            return {"memory": True, "last": True}, b""
        except (duckdb.Error, pyarrow.ArrowException, OSError) as error:  # Arrow's hold DuckDB's message
            return self._error(first_line(error)[:MOST_MESSAGE]), b""
        except Exception:
            return {"bug": traceback.format_exc()[-MOST_MESSAGE:], "last": True}, b""

    def _error(self, message: str) -> dict[str, Any]:
        """The reply for an error of DuckDB, whose message begins with its kind."""
        kind = message.partition(" Error:")[0]
        if kind == "Out of Memory":
            return {"memory": True, "last": True}
        if kind in ("IO", "Serialization") or CORRUPT in message:
            return {"error": str(damaged(self._store, message)), "last": True}
        return {"error": f"the query was not answered: {message}", "last": kind in ("INTERNAL", "FATAL")}

    def _open(self, store: str, files: dict[str, tuple[str, str]], search_path: str) -> None:
        """Attach ``files``, alias -> (path, hash of the content), and detach those of before."""
        if self._connection:
            self._connection.close()
        self._connection = memory_instance(SQL_MEMORY)
        for alias, (path, _) in files.items():
            attach(self._connection, Path(path), alias)
        self._connection.execute("SET arrow_lossless_conversion = true")
        lock_down(self._connection)
        self._store, self._search_path = Path(store), search_path
        self._rules = SqlRules.of(self._connection) if files else SqlRules()

    def _rows(self, query: str, values: bytes, limit: int) -> tuple[dict[str, Any], bytes]:
        import pyarrow

        assert self._connection
        with self._connection.cursor() as cursor:
            cursor.execute(f"SET search_path = '{self._search_path}'")  # each cursor has its own
            statement = self._rules.question(cursor, query)
            given = pyarrow.ipc.open_stream(values).read_all().to_pylist()[0] if values else {}
            reader = cursor.sql(statement, params=list(given.values())).to_arrow_reader(BATCH)
            found, n_rows, n_bytes = [], 0, 0
            for batch in reader:
                found.append(batch.slice(0, limit - n_rows))
                n_rows, n_bytes = n_rows + len(batch), n_bytes + found[-1].nbytes
                if n_bytes > MOST_BYTES:
                    raise UserError(
                        f"the answer has more than {MOST_BYTES >> 20} MiB; select fewer rows or columns, "
                        "or shorten texts"
                    )
                if n_rows > limit:
                    break
            sink = io.BytesIO()
            with pyarrow.ipc.new_stream(sink, reader.schema) as writer:
                for batch in found:
                    writer.write_batch(batch)
            return {"more": n_rows > limit}, sink.getvalue()


if __name__ == "__main__":
    main()
