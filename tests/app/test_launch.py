from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from saebench.core.errors import UserError
from saebench_app.launch import explore


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_busy_port_gives_an_error(small_store: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} .*--port"):
            explore(small_store, port=port, open_browser=False)


@pytest.mark.parametrize("port", [0, -1, 99_999])
def test_an_invalid_port_gives_an_error(small_store: Path, port: int) -> None:
    with pytest.raises(UserError, match=rf"port {port} .*--port"):
        explore(small_store, port=port, open_browser=False)


def test_a_missing_store_gives_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a feature store"):
        explore(tmp_path, port=free_port(), open_browser=False)


@contextlib.contextmanager
def exploring(store: Path, cwd: Path | None = None, **settings: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that explores ``store``; it is ended, if it has not ended itself."""
    code = (  # a shell that runs the tests in the background makes its children deaf to SIGINT
        "import json, signal, sys; from saebench_app.launch import explore\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.exit(explore(sys.argv[1], **json.loads(sys.argv[2])))"
    )
    given = json.dumps({"open_browser": False, **settings})
    line = [sys.executable, "-c", code, str(store), given]
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(20)


def greeting(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def wait_until_refused(port: int, seconds: float = 20) -> None:
    """Wait until nothing listens on ``port`` any more."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.1)
    pytest.fail("the server is still there")


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_explore_serves_until_it_is_interrupted(small_store: Path, ending: signal.Signals) -> None:
    port = free_port()
    with exploring(small_store, port=port) as process:
        assert f"http://127.0.0.1:{port}/features (Ctrl-C ends)" in greeting(process)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health") as answer:
            assert answer.status == 200
        os.kill(process.pid, ending)
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=1)


def test_the_server_ends_after_sigkill_of_explore(small_store: Path) -> None:
    port = free_port()
    with exploring(small_store, port=port) as process:
        greeting(process)
        with socket.create_connection(("127.0.0.1", port)):  # a browser that stays connected
            process.kill()
            process.wait()
            wait_until_refused(port)


@pytest.mark.parametrize(
    ("host", "token", "asked"),
    [
        ("127.0.0.1", None, False),
        ("127.0.0.1", True, True),
        ("0.0.0.0", None, True),
        ("0.0.0.0", False, False),
    ],
)
def test_a_token_is_asked_for_beyond_this_machine_or_when_wanted(
    small_store: Path, host: str, token: bool | None, asked: bool
) -> None:
    port = free_port()
    with exploring(small_store, port=port, host=host, token=token) as process:
        line = greeting(process)
        key = line.partition("?token=")[2].split()[0] if "?token=" in line else ""
        assert (len(key) >= 43) == asked
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        if asked:
            with pytest.raises(urllib.error.HTTPError, match="403"):
                opener.open(f"http://127.0.0.1:{port}/features")
            with pytest.raises(urllib.error.HTTPError, match="403"):
                opener.open(f"http://127.0.0.1:{port}/features?token={key[:-1]}")
        with opener.open(f"http://127.0.0.1:{port}/features?token={key}") as answer:
            assert answer.url == f"http://127.0.0.1:{port}/features" + ("" if asked else "?token=")
        seen = [path.read_bytes() for path in _process_files(process.pid)]
        assert not [one for one in seen if key and key.encode() in one]
        process.terminate()
        logged = "".join(process.communicate(timeout=20))
        assert not key or key not in logged


def _process_files(pid: int) -> list[Path]:
    """Arguments and environment of a process and its children, as other users and processes may see them."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    assert children
    return [Path(f"/proc/{one}/{name}") for one in (pid, *children) for name in ("cmdline", "environ")]


def test_settings_files_of_streamlit_are_not_read(small_store: Path, tmp_path: Path) -> None:
    """The current folder may be someone else's, such as a store that was downloaded."""
    port = free_port()
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(0.2)
        (tmp_path / ".streamlit").mkdir()
        (tmp_path / ".streamlit" / "config.toml").write_text(
            "[server]\nbaseUrlPath = 'x'\nenableAgentApi = true\n[client]\nshowErrorDetails = 'full'\n"
            f"[theme]\nbase = 'http://127.0.0.1:{elsewhere.getsockname()[1]}/theme.toml'\n"
        )
        with exploring(small_store, tmp_path, port=port) as process:
            greeting(process)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health") as answer:
                assert answer.status == 200
        with pytest.raises(TimeoutError):
            elsewhere.accept()


@pytest.mark.parametrize(
    "attempt",
    [
        "urllib.request.urlopen('http://192.0.2.1', timeout=5)",
        "urllib.request.urlopen('http://example.invalid', timeout=5)",
        "socket.create_connection(('192.0.2.1', 80), timeout=5)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 80))",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'', ('192.0.2.1', 80))",
        "socket.gethostbyname('example.invalid')",
        "asyncio.run(asyncio.open_connection('192.0.2.1', 80))",
        "httpx.get('http://192.0.2.1')",
    ],
)
def test_a_process_of_the_explorer_connects_to_no_other_machine(attempt: str) -> None:
    code = (
        "import asyncio, httpx, os, socket, sys, urllib.request\n"
        "from saebench_app.offline import stay_offline\n"
        "stay_offline()\n"
        "with socket.create_server(('localhost', 0)) as here:\n"
        "    socket.create_connection(here.getsockname()).close()\n"
        f"try: {attempt}\n"
        "except Exception as error: print(os.environ['HF_HUB_OFFLINE'], 'the explorer' in repr(error))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert run.stdout.split() == ["1", "True"], run.stderr


def test_the_app_needs_neither_torch_nor_a_model(small_store: Path) -> None:
    code = (
        "import sys; sys.argv = ['main.py', sys.argv[1]]\n"
        "from streamlit.testing.v1 import AppTest\n"
        "from saebench_app.serve import MAIN\n"
        "assert not AppTest.from_file(MAIN, default_timeout=60).run().exception\n"
        "import saebench_app.page.feature, saebench_app.page.features\n"
        "from saebench_app.page import compare, explain, map, sql, train\n"
        "print(sorted({'torch', 'transformers', 'transformer_lens', 'triton'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(small_store)], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
