from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from saebench.core.errors import UserError
from saebench_app import worker
from saebench_app.work import FACTS, Task, Work, found
from tests.app.conftest import finish, shown

Visit = Callable[..., AppTest]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z"


def test_a_result_is_kept_under_the_hash_of_its_identity(own_cache: Path) -> None:
    task = Task("map", {"run": "x"}, ("hash", "pca"))
    assert task.key == Task("map", {"run": "elsewhere"}, ("hash", "pca")).key
    assert task.key != Task("map", {"run": "x"}, ("hash", "umap")).key
    assert task.folder.parent.parent == own_cache
    assert found(task) is None
    table = pd.DataFrame({"feature": [1, 2]})
    worker.keep(task.folder, {"n": 2}, {"points": table})
    result = found(task)
    assert result is not None
    assert result.facts["n"] == 2
    assert result.tables["points"].equals(table)
    worker.keep(task.folder, {"n": 3}, {})
    again = found(task)
    assert again is not None
    assert (again.facts["n"], again.tables) == (3, {})
    (task.folder / FACTS).write_text("{")
    os.utime(task.folder / FACTS, (1, 1))
    assert found(task) is None
    assert [path.name for path in task.folder.parent.iterdir()] == [task.folder.name]


def ended(events: str, log: str, code: int) -> Work:
    """The work of a process that sent ``events``, wrote ``log`` and exited with ``code``."""
    script = f"import sys; sys.stdout.write({events!r}); sys.stderr.write({log!r}); sys.exit({code})"
    files = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen([sys.executable, "-c", script], stdout=files[0], stderr=files[1])
    process.wait()
    return Work(process, *files)


HALF = (
    json.dumps({"event": "progress", "label": "check", "done": 1200, "total": 2400, "unit": "checks"}) + "\n"
)


def test_the_last_progress_event_gives_the_share_and_the_text() -> None:
    earlier = HALF.replace("1200", "10")
    work = ended(f'{earlier}{HALF}{{"event": "prog', "a warning of a library\n", 0)
    assert work.state() == "done"
    assert work.progress().share == 0.5
    assert work.progress().text.startswith("1,200 of 2,400 checks, ")
    assert work.result() == {}


def test_an_error_event_gives_the_sentence_of_a_failure() -> None:
    error = json.dumps({"event": "error", "message": "the disk is full; free some space"})
    work = ended(f"{HALF}{error}\n", "saebench: something else\n", 2)
    assert work.state() == "failed"
    assert work.error_message() == "The disk is full; free some space."
    work.stop()
    assert work.state() == "stopped"


def test_a_crash_without_an_error_event_names_the_last_line_of_its_log() -> None:
    assert "ValueError: x" in ended(HALF, "Traceback\nValueError: x\n", 1).error_message()


def test_a_result_event_is_read_back() -> None:
    assert ended('{"event": "result", "generation": 3}\n', "", 0).result() == {"generation": 3}


def test_a_job_that_is_stopped_ends(tmp_path: Path) -> None:
    script = "import time; print(1, flush=True); time.sleep(60)"
    with open(tmp_path / "log", "w+b") as log:
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=log)
        assert process.stdout is not None
        process.stdout.readline()
        work = Work(process, log, log)
        assert work.state() == "running"
        work.stop()
        assert work.state() == "stopped"
        assert gone(process.pid)


@pytest.mark.parametrize("deaf", [False, True])
def test_a_worker_ends_with_its_server(deaf: bool) -> None:
    """Also when it is in a call that no signal interrupts."""
    child = (
        "import os, signal, sys, time; from functools import partial; from saebench_app import lifeline\n"
        "lifeline.SECONDS_TO_END = 0.2\n"  # a shell's job may be born without the handler
        f"signal.signal(signal.SIGINT, {'signal.SIG_IGN' if deaf else 'signal.default_int_handler'})\n"
        "lifeline.end_after(partial(lifeline.until_orphaned, int(sys.argv[1]), 0.05), signal.SIGINT)\n"
        "time.sleep(60)"
    )
    parent = (
        "import os, subprocess, sys\n"
        f"line = [sys.executable, '-c', {child!r}, str(os.getpid())]\n"
        "print(subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)"
    )
    line = [sys.executable, "-c", parent]
    pid = int(subprocess.run(line, stdout=subprocess.PIPE, check=True).stdout)
    end = time.monotonic() + 30
    while not gone(pid):
        assert time.monotonic() < end
        time.sleep(0.05)


def run_worker(kind: str, arguments: dict[str, object], folder: Path) -> tuple[int, list[dict[str, object]]]:
    """The exit code of a worker and the events that it sent."""
    command = [sys.executable, "-m", "saebench_app.worker", str(os.getpid()), kind]
    ran = subprocess.run([*command, json.dumps(arguments), str(folder)], stdout=subprocess.PIPE)
    return ran.returncode, [json.loads(line) for line in ran.stdout.splitlines()]


def test_a_worker_sends_an_error_event_for_what_a_person_must_change(tmp_path: Path) -> None:
    code, events = run_worker("check", {"store": "/no/such"}, tmp_path / "result")
    assert code == 2
    assert [event["event"] for event in events] == ["error"]
    assert str(events[0]["message"]).startswith("/no/such is not a feature store")
    assert not (tmp_path / "result").exists()


def test_a_worker_sends_progress_then_its_result(small_store: Path, tmp_path: Path) -> None:
    code, events = run_worker("check", {"store": str(small_store)}, tmp_path / "result")
    assert code == 0
    first, last, result = events[0], events[-2], events[-1]
    assert (first["event"], first["label"], first["unit"]) == ("progress", "check", "checks")
    assert last["done"] == last["total"] == first["total"]
    assert result == {"event": "result", "folder": str(tmp_path / "result")}
    assert (tmp_path / "result" / FACTS).exists()


def test_the_store_page_checks_the_store(visit: Visit, two: Path, own_cache: Path) -> None:
    app = visit(two)
    health = shown(app, "health")
    assert health is not None
    assert "Not checked" in health["text"]
    app.button(key="start-check").click().run()
    assert app.button(key="stop-check")
    app = finish(app)
    assert not app.exception
    health = shown(app, "health")
    assert health is not None
    assert "No damage" in health["text"]
    assert "generation 2" in health["text"]


def test_the_check_of_a_damaged_store_lists_the_damage(
    visit: Visit, small_store: Path, own_cache: Path, tmp_path: Path
) -> None:
    import shutil

    from saebench.store.publish import read_manifest

    store = tmp_path / "store"
    shutil.copytree(small_store, store)
    app = visit(store)
    file = store / read_manifest(store).saes[0].file.path
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    os.chmod(file, 0o644)
    file.write_bytes(content)
    app = finish(app.button(key="start-check").click().run())
    assert not app.exception
    health, findings = shown(app, "health"), shown(app, "findings")
    assert health is not None
    assert findings is not None
    assert health["kind"] == "error"
    assert findings["rows"][0][0]["text"] == read_manifest(store).saes[0].file.path
    assert "checksum" in findings["rows"][0][1]["text"]


def test_the_check_of_a_missing_store_raises(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        worker.check(str(tmp_path))
