from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from saebench.core.errors import UserError
from saebench_app.launch import SETTINGS, command, explore


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


def test_the_command_names_the_store_last_and_switches_telemetry_off() -> None:
    line = command(Path("/a --b"), host="127.0.0.1", port=1)
    assert line[-2:] == ["--", "/a --b"]
    assert "--server.address=127.0.0.1" in line
    assert SETTINGS["browser.gatherUsageStats"] == "false"


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_explore_serves_until_it_is_interrupted(small_store: Path, ending: signal.Signals) -> None:
    port = free_port()
    code = (  # a shell that runs the tests in the background makes its children deaf to SIGINT
        "import signal, sys; from saebench_app.launch import explore\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.exit(explore(sys.argv[1], port=int(sys.argv[2]), open_browser=False))"
    )
    line = [sys.executable, "-c", code, str(small_store), str(port)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert f"http://127.0.0.1:{port}/features" in process.stdout.readline()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health") as answer:
            assert answer.status == 200
        os.kill(process.pid, ending)
        assert process.wait(20) == 0
    finally:
        process.terminate()  # killed, it would leave its server behind
        process.wait(20)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=1)


def test_the_app_needs_neither_torch_nor_a_model(small_store: Path) -> None:
    code = (
        "import sys; sys.argv = ['main.py', sys.argv[1]]\n"
        "from streamlit.testing.v1 import AppTest\n"
        "from saebench_app.launch import MAIN\n"
        "assert not AppTest.from_file(MAIN, default_timeout=60).run().exception\n"
        "import saebench_app.page.feature, saebench_app.page.features\n"
        "from saebench_app.page import compare, explain, map, sql, train\n"
        "print(sorted({'torch', 'transformers', 'transformer_lens', 'triton'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(small_store)], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
