"""Start the explorer: one Streamlit server, for one store, on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from saebench.core.errors import UserError
from saebench_app.access import EVERY_ADDRESS, READ_ONLY, Access, is_loopback

START_SECONDS = 60
STOP_SECONDS = 5


def explore(
    store: Path,
    *,
    runs: Sequence[Path] = (),
    port: int = 8501,
    host: str = "127.0.0.1",
    token: bool | None = None,
    read_only: bool = False,
    open_browser: bool = True,
) -> int:
    """Serve the explorer for ``store`` until it is interrupted; the exit code of the server.

    ``runs`` are run directories that its SAEs came from, for the pages that run the model. With ``token``,
    only those who have the printed URL get in; None: if other machines can reach ``host``. ``read_only``
    switches annotations, jobs and SQL off.

    Raises:
        UserError: ``store`` or a run cannot be opened, or ``port`` is in use.
    """
    from saebench.store.query import open_store

    store, runs = Path(store).resolve(), [Path(run).resolve() for run in runs]
    open_store(store).close()
    if runs:
        _require_runs(runs)
    require_free_port(host, port)
    wanted = not is_loopback(host) if token is None else token
    access = Access(host, port, secrets.token_urlsafe(32) if wanted else None)
    server = start_server(store, access, runs=runs, read_only=read_only)
    try:
        with _sigterm_interrupts():
            if wait_until_up(server, access):
                print(_greeting(store, access), flush=True)
                if open_browser and not access.token:  # the browser's arguments would show it to all users
                    webbrowser.open(access.url)
            return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        stop(server)


def start_server(
    store: Path, access: Access, *, runs: Sequence[Path] = (), read_only: bool = False
) -> subprocess.Popen[bytes]:
    """The process of the server, which ends at the latest when this process does.

    It is in a session of its own, so that only this process stops it and not the terminal's Ctrl-C as well.
    The store and its runs are arguments, where no URL reaches.
    """
    server = subprocess.Popen(
        [sys.executable, "-m", "saebench_app.serve", str(store), *map(str, runs)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, READ_ONLY: str(int(read_only))},
        start_new_session=True,
    )
    assert server.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended, which the caller will see
        server.stdin.write(json.dumps(asdict(access)).encode() + b"\n")
        server.stdin.flush()
    return server


def _greeting(store: Path, access: Access) -> str:
    others = "with the address of this machine from others; " if access.host in EVERY_ADDRESS else ""
    return f"exploring {store} at {access.url} ({others}Ctrl-C ends)"


def require_free_port(host: str, port: int) -> None:
    """Raises UserError when ``port`` cannot be listened on, or is 0: the port would be unknown."""
    if port == 0:
        raise UserError("port 0 is not a port that a browser can open; choose another one with --port")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"port {port} of {host} cannot be used ({error}); choose another one with --port"
            ) from None


def _require_runs(runs: Sequence[Path]) -> None:
    """Raises UserError when one of ``runs`` is not a run; unfinished ones are allowed, for the page Train."""
    from saebench.runs.run import Run

    for run in map(Run, runs):
        if run.is_finished:
            run.description()
        elif not run.is_training_directory:
            run.load()  # says what is missing


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server: ask it first, kill it after a while."""
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_until_up(server: subprocess.Popen[bytes], access: Access) -> bool:
    """Whether the server accepts connections; False when it has ended, or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((access.host, access.port), timeout=1):
            return True
        time.sleep(0.05)
    return False


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Turn SIGTERM into an interrupt, so that the server is stopped as well."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
