"""`saebench doctor`: healthy and broken installations, and the format of its JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import saebench_data
from saebench.doctor import Diagnosis, Finding, diagnosis

SECTIONS = ("packages", "devices", "optional", "plugins", "system", "data")
KEYS = {"name", "state", "found", "detail", "fix"}


def doctor(*words: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, "-m", "saebench", "doctor", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def diagnosis_of(*findings: Finding) -> Diagnosis:
    return Diagnosis(packages=list(findings), devices=[], optional=[], plugins=[], system=[], data=[])


def test_healthy_installation_exits_0_and_findings_have_same_keys() -> None:
    done = doctor("--json")
    assert done.returncode == 0 and not done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {"ok", "problem", *SECTIONS}
    assert report["ok"] is True and report["problem"] is None
    for section in SECTIONS:
        for finding in report[section]:
            assert set(finding) == KEYS and finding["state"] in ("ok", "missing")
            assert finding["state"] == "ok" or finding["fix"] or finding["detail"]
    found = {finding["name"] for section in SECTIONS for finding in report[section]}
    expected = {"saebench", "python", "torch", "transformers", "transformer-lens", "duckdb", "streamlit"}
    expected |= {"cpu", "triton", "kaleido", "browser", "tensorboard", "wandb", "peers"}
    assert found >= expected | {"memory", "disk", "cache", "demo_model", "text"}
    assert "kernels" in report["devices"][0]["detail"]


def test_broken_packages_exit_2_with_one_sentence(tmp_path: Path) -> None:
    """This includes the argument parser, and a package that ends the process."""
    (tmp_path / "duckdb.py").write_text("raise OSError('wrong\\nglibc')")
    (tmp_path / "gguf.py").write_text("import os; os._exit(3)")
    (tmp_path / "cyclopts.py").write_text("raise SystemExit('no')")
    done = doctor(path=tmp_path)
    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("saebench: cyclopts does not work (SystemExit: no); pip install 'cyclopts>=5'")
    assert "duckdb" in sentence and "gguf" in sentence and "torch" not in sentence
    lines = {line.split()[1]: line for line in done.stdout.splitlines() if line.startswith("BROKEN")}
    assert "OSError: wrong glibc" in lines["duckdb"]
    assert "the process ended with code 3" in lines["gguf"]


def test_problem_names_first_broken_part_with_fix_and_then_others() -> None:
    fine = Finding(name="numpy", state="ok", found="2.0")
    optional = Finding(name="wandb", state="missing", detail="train --wandb", fix="pip install wandb")
    first = Finding(name="torch", state="broken", detail="not installed", fix="pip install torch")
    second = Finding(name="text", state="broken", detail="damaged")
    assert diagnosis_of(fine, optional).problem is None
    assert diagnosis_of(fine, first).problem == "torch does not work (not installed); pip install torch"
    several = diagnosis_of(first, second).problem
    assert several == "torch does not work (not installed); pip install torch; 1 more: text"


def test_too_old_version_is_broken() -> None:
    found = diagnosis._package("numpy", ">=99", {"state": "ok"})
    assert found.state == "broken" and found.detail == "saebench needs numpy>=99"
    assert found.fix == "pip install 'numpy>=99'"
    assert diagnosis._package("no-such-package", "", {"state": "broken"}).detail == "not installed"


def test_damaged_bundled_file_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(saebench_data.FOLDER, tmp_path / "data")
    monkeypatch.setattr(saebench_data, "FOLDER", tmp_path / "data")
    assert {finding.state for finding in diagnosis._data()} <= {"ok", "missing"}
    (tmp_path / "data/demo_model/model.safetensors").write_bytes(b"short")
    (tmp_path / "data/text/state_of_the_union.parquet").unlink()
    model, text = diagnosis._data()[:2]
    assert model.state == text.state == "broken"
    assert model.detail == "missing or damaged: demo_model/model.safetensors"
    assert text.detail == "missing or damaged: text/state_of_the_union.parquet"


def test_checksums_name_every_bundled_file() -> None:
    files = {
        f"{part}/{file.name}"
        for part in ("demo_model", "text")
        for file in (saebench_data.FOLDER / part).iterdir()
    }
    assert set(json.loads((saebench_data.FOLDER / saebench_data.CHECKSUMS).read_text())) == files


def test_unwritable_cache_directory_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SAEBENCH_CACHE", str(tmp_path / "file"))
    cache = next(finding for finding in diagnosis._system() if finding.name == "cache")
    assert cache.state == "missing" and cache.fix == "set SAEBENCH_CACHE to a directory that can be written"


def test_error_in_check_is_a_finding() -> None:
    def check() -> list[Finding]:
        raise RuntimeError("odd")

    (found,) = diagnosis._guarded("system", check)
    assert (found.state, found.detail) == ("broken", "RuntimeError: odd")
