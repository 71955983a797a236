"""Start the explorer: one Streamlit server, for one store, on this machine."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from collections.abc import Iterator, Sequence
from pathlib import Path

from saebench.core.errors import UserError

MAIN = Path(__file__).with_name("main.py")
START_SECONDS = 60
STOP_SECONDS = 5

SETTINGS = {
    "browser.gatherUsageStats": "false",
    "server.headless": "true",
    "server.fileWatcherType": "none",
    "server.runOnSave": "false",
    "server.showEmailPrompt": "false",
    "client.toolbarMode": "viewer",
    "client.showErrorLinks": "false",
    "global.disableWidgetStateDuplicationWarning": "true",
    "logger.level": "warning",
    "theme.light.primaryColor": "#1f6fb2",
    "theme.dark.primaryColor": "#5aa9e6",
    "theme.baseFontSize": "15",
    "theme.paddingTop": "2.2rem",
    "theme.headingFontSizes": '["1.7rem", "1.35rem", "1.1rem", "1rem", "1rem", "1rem"]',
}
"""Nothing is sent anywhere, no files are watched, and all pages have the same style."""


def explore(
    store: Path,
    *,
    runs: Sequence[Path] = (),
    port: int = 8501,
    host: str = "127.0.0.1",
    open_browser: bool = True,
) -> int:
    """Serve the explorer for ``store`` until it is interrupted; the exit code of the server.

    ``runs`` are run directories that its SAEs came from, for the pages that run the model.

    Raises:
        UserError: ``store`` or a run cannot be opened, or ``port`` is in use.
    """
    from saebench.store.query import open_store

    store, runs = Path(store).resolve(), [Path(run).resolve() for run in runs]
    open_store(store).close()
    if runs:
        _require_runs(runs)
    require_free_port(host, port)
    # In a session of its own, so that only this process stops it and not the terminal's Ctrl-C as well.
    server = subprocess.Popen(
        command(store, host=host, port=port, runs=runs), stdout=subprocess.DEVNULL, start_new_session=True
    )
    url = f"http://{host}:{port}/features"
    try:
        with _sigterm_interrupts():
            if _wait_until_up(server, host, port):
                print(f"exploring {store} at {url} (Ctrl-C ends)", flush=True)
                if open_browser:
                    webbrowser.open(url)
            return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        stop(server)


def command(store: Path, *, host: str, port: int, runs: Sequence[Path] = ()) -> list[str]:
    """The server's command line; the store and its runs follow ``--``, where no URL reaches."""
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
    flags += [f"--server.address={host}", f"--server.port={port}"]
    program = ["-m", "saebench_app.serve", "run", str(MAIN)]
    return [sys.executable, *program, *flags, "--", str(store), *map(str, runs)]


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


def _wait_until_up(server: subprocess.Popen[bytes], host: str, port: int) -> bool:
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
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
