from __future__ import annotations

import os
import subprocess
import sys
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


def test_a_result_is_kept_by_what_it_was_made_of(own_cache: Path) -> None:
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


def test_progress_and_complaints_are_read_from_its_words(tmp_path: Path) -> None:
    def work(words: str, code: int) -> Work:
        script = f"import sys; sys.stderr.write({words!r}); sys.exit({code})"
        log = open(tmp_path / "log", "w+b")  # noqa: SIM115 - the work keeps it
        made = Work(subprocess.Popen([sys.executable, "-c", script], stderr=log), log)
        made.process.wait()
        return made

    good = work("check: 1,200/2,400 checks (50%)  7 checks/s, 0:01 so far\nsome warning\n", 0)
    assert good.state() == "done"
    assert good.progress().share == 0.5
    assert good.progress().text.startswith("1,200 of 2,400 checks (50%)")
    bad = work("check: 1/2 checks (50%)\nsaebench: the disk is full; free some space\n", 2)
    assert bad.state() == "failed"
    assert bad.error_message() == "The disk is full; free some space."
    assert "ValueError" in work("Traceback\nValueError: x\n", 1).error_message()
    bad.stop()
    assert bad.state() == "stopped"


def test_work_that_is_stopped_ends(tmp_path: Path) -> None:
    script = "import time; print(1, flush=True); time.sleep(60)"
    with open(tmp_path / "log", "w+b") as log:
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=log)
        assert process.stdout is not None
        process.stdout.readline()
        work = Work(process, log)
        assert work.state() == "running"
        work.stop()
        assert work.state() == "stopped"
        assert gone(process.pid)


def test_a_worker_ends_with_its_server() -> None:
    child = (
        "import signal, sys, threading, time; from saebench_app import worker; worker.LOOKS_APART = 0.05\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's job may be born without
        "threading.Thread(target=worker._end_with, args=(int(sys.argv[1]),), daemon=True).start()\n"
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


def test_what_a_worker_cannot_do_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_end_with", lambda server: None)
    monkeypatch.setattr("saebench.core.progress.SECONDS_BETWEEN_LINES", 1.0)
    assert worker.main("0", "check", '{"store": "/no/such"}', str(tmp_path / "result")) == 2
    assert "saebench: /no/such is not a feature store" in capsys.readouterr().err
    assert not (tmp_path / "result").exists()


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
    assert "Nothing wrong" in health["text"]
    assert "generation 2" in health["text"]


def test_a_damaged_store_is_found_out(
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


def test_no_store_is_refused_before_a_worker_begins(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        worker.check(str(tmp_path))
