"""The wheel of saebench, installed and used without the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

import saebench

ROOT = Path(__file__).parent.parent
FOLDERS = ("saebench", "app", "data", "kernels")
PACKAGES = ("saebench", "app/saebench_app", "data/saebench_data", "kernels/saebench_kernels")
NOT_INSTALLED = {"__pycache__", ".ruff_cache", ".mypy_cache"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that build files do not come from or go into the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns(*NOT_INSTALLED))
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source))
    [made] = out.glob("saebench-*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an environment with the wheel and the current dependencies, without the checkout."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    site = Path(capture(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # A path file does not read path files in the folders it adds, so the editable install is not found.
    dependencies = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (site / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    pip("--python", str(python), "install", "--quiet", "--no-deps", "--force-reinstall", str(wheel))
    return home / "bin"


def pip(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words], capture_output=True, text=True, cwd=ROOT.parent, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def capture(program: Path, *words: str, cwd: Path | None = None) -> str:
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [program, *words], capture_output=True, text=True, cwd=cwd, env=one_thread, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_has_every_file_of_packages(wheel: Path) -> None:
    carried = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        path.relative_to((ROOT / package).parent).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and not NOT_INSTALLED & set(path.parts)
    }
    assert expected <= carried
    metadata = zipfile.ZipFile(wheel).read(f"saebench-{saebench.__version__}.dist-info/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata


def test_installed_program_runs_outside_checkout(installed: Path, tmp_path: Path) -> None:
    assert capture(installed / "saebench", "--version", cwd=tmp_path) == saebench.__version__ + "\n"
    assert "harvest" in capture(installed / "saebench", "--help", cwd=tmp_path)
    code = (
        "import saebench, saebench_app, saebench_data, saebench_kernels as k\n"
        "print(*(m.__file__ for m in (saebench, saebench_app, saebench_data, k)), sep='\\n')\n"
        "assert saebench_data.path('text/state_of_the_union.parquet').stat().st_size > 0\n"
    )
    for file in capture(installed / "python", "-c", code, cwd=tmp_path).splitlines():
        assert Path(file).is_relative_to(installed.parent)


def test_installed_program_trains(installed: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(4000, 32)).astype(np.float32))
    capture(installed / "saebench", "cache", "import", "x.npy", "--out", "cache", "--quiet", cwd=tmp_path)
    words = "train --cache cache --out run --d-sae 64 --k 4 --tokens 4e5 --batch-size 512 --json --quiet"
    result = json.loads(capture(installed / "saebench", *words.split(), cwd=tmp_path))
    assert result["fvu"] < 0.9
    assert (tmp_path / "run" / "sae.safetensors").exists()
