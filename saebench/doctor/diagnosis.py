"""A diagnosis: every part of the installation, whether it works, and what to do where it does not."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import saebench
from saebench.core.files import free_memory, human_bytes

State = Literal["ok", "missing", "broken"]
SECONDS = 600
"""Time for all imports together, on a slow disk."""
LITTLE_DISK = 1 << 30
EXTRAS = {
    "triton": ("gpu", "fused kernels on an NVIDIA GPU"),
    "kaleido": ("png", "compare.png"),
    "tensorboard": ("tensorboard", "train --tensorboard"),
    "wandb": ("wandb", "train --wandb"),
}
"""Optional package -> the extra that installs it, and what needs it."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PEERS = Path(".venv-peers")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One part of the installation."""

    name: str
    state: State
    """'ok', 'missing' (something optional that is not there), or 'broken' (a basic command needs it)."""
    found: str | None = None
    """Version, size or place."""
    detail: str | None = None
    """What it is for, or what is wrong with it."""
    fix: str | None = None
    """What to do about it."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Findings by section, in the order in which they are shown."""

    packages: list[Finding]
    """saebench, Python and the packages that saebench requires."""
    devices: list[Finding]
    """The CPU and each GPU, with the kernels that training runs there."""
    optional: list[Finding]
    """Parts that some commands can use."""
    plugins: list[Finding]
    """What other packages add to saebench."""
    system: list[Finding]
    """Memory, disk and the cache directory."""
    data: list[Finding]
    """The bundled model and text."""

    @property
    def problem(self) -> str | None:
        """One sentence on what is broken; None if nothing is."""
        broken = [
            finding for part in self.sections().values() for finding in part if finding.state == "broken"
        ]
        if not broken:
            return None
        first = broken[0]
        more = f"; {len(broken) - 1} more: {', '.join(f.name for f in broken[1:])}" if broken[1:] else ""
        fix = f"; {first.fix}" if first.fix else ""
        return f"{first.name} does not work ({first.detail}){fix}{more}"

    def sections(self) -> dict[str, list[Finding]]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def as_json(self) -> dict[str, Any]:
        findings = {
            section: [dataclasses.asdict(finding) for finding in part]
            for section, part in self.sections().items()
        }
        return {"ok": self.problem is None, "problem": self.problem, **findings}


def diagnose() -> Diagnosis:
    """Look at everything. Packages are imported in a process of their own; nothing that is broken raises."""
    required = _required()
    modules = _modules(required)
    answers = _probe([*(f"import {module}" for module in modules.values()), "devices", "plugins"])
    packages = [_python(), Finding(name="saebench", state="ok", found=saebench.__version__)]
    for name, requirement in required.items():
        packages.append(_package(name, requirement, answers[f"import {modules[name]}"][0]))
    return Diagnosis(
        packages=packages,
        devices=[Finding(**row) for row in answers["devices"]],
        optional=_guarded("optional parts", _optional),
        plugins=[
            Finding(**{**row, "state": "missing"} if row["state"] == "broken" else row)
            for row in answers["plugins"]
        ],
        system=_guarded("system", _system),
        data=_guarded("bundled data", _data),
    )


def _guarded(name: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """What ``look`` finds; an error in it is a finding itself."""
    try:
        return look()
    except Exception as error:
        return [Finding(name=name, state="broken", detail=f"{type(error).__name__}: {error}")]


def _required() -> dict[str, str]:
    """Name -> version specifier of each package that saebench requires, as its own metadata says."""
    try:
        lines = metadata.requires("saebench") or []
    except Exception:  # not installed, or damaged metadata: the most important ones
        lines = ["torch", "numpy", "safetensors", "pydantic", "cyclopts"]
    found = {}
    for line in lines:
        match = re.match(r"([A-Za-z0-9._-]+)([^;]*)", line)
        if match and "extra ==" not in line:
            found[match[1].lower()] = match[2].strip()
    return found


def _modules(required: Iterable[str]) -> dict[str, str]:
    """Name of each package -> the module to import: pyyaml has yaml, huggingface-hub has huggingface_hub."""
    of_package: dict[str, list[str]] = {}
    with contextlib.suppress(Exception):  # damaged metadata
        for module, packages in metadata.packages_distributions().items():
            for package in packages:
                of_package.setdefault(package.lower().replace("_", "-"), []).append(module)
    found = {}
    for name in required:
        usual = name.replace("-", "_").replace(".", "_")
        public = [module for module in of_package.get(name, []) if not module.startswith("_")]
        found[name] = usual if usual in public or not public else sorted(public)[0]
    return found


def _probe(steps: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """What saebench.doctor.probe answers to each step; a step in which its process dies is broken."""
    answers: dict[str, list[dict[str, Any]]] = {}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    while rest := [step for step in steps if step not in answers]:
        code: int | str
        with tempfile.TemporaryFile("w+") as said:
            command = [sys.executable, "-P", "-m", "saebench.doctor.probe", *rest]
            try:
                code = subprocess.run(
                    command,
                    env=environment,
                    stdout=said,
                    stderr=subprocess.DEVNULL,
                    check=False,
                    timeout=SECONDS,
                ).returncode
            except subprocess.TimeoutExpired:
                code = f"no answer after {SECONDS} s"
            said.seek(0)
            for line in said:
                step, rows = json.loads(line)
                answers[step] = rows
        left = next((step for step in rest if step not in answers), None)
        if left is not None:
            died = f"the process ended with code {code}" if isinstance(code, int) else code
            answers[left] = [{"name": left.removeprefix("import "), "state": "broken", "detail": died}]
    return answers


def _python() -> Finding:
    return Finding(name="python", state="ok", found=platform.python_version(), detail=sys.executable)


def _package(name: str, requirement: str, imported: dict[str, Any]) -> Finding:
    """A required package: whether it is there, new enough, and can be imported."""
    install = f"pip install '{name}{requirement}'"
    try:
        version = metadata.version(name)
    except Exception:
        return Finding(name=name, state="broken", detail="not installed", fix=install)
    if imported["state"] != "ok":
        return Finding(name=name, state="broken", found=version, detail=imported["detail"], fix=install)
    if not _fits(version, requirement):
        detail = f"saebench needs {name}{requirement}"
        return Finding(name=name, state="broken", found=version, detail=detail, fix=install)
    return Finding(name=name, state="ok", found=version)


def _fits(version: str, requirement: str) -> bool:
    """Whether ``version`` is one that ``requirement`` allows; yes where that cannot be told."""
    try:
        from packaging.specifiers import SpecifierSet

        return SpecifierSet(requirement).contains(version, prereleases=True)
    except Exception:
        return True


def _optional() -> list[Finding]:
    found = []
    for name, (extra, purpose) in EXTRAS.items():
        if importlib.util.find_spec(name) is None:
            fix = f"pip install 'saebench[{extra}]'"
            found.append(Finding(name=name, state="missing", detail=purpose, fix=fix))
        else:
            found.append(Finding(name=name, state="ok", found=metadata.version(name), detail=purpose))
    browser = next(filter(None, map(shutil.which, BROWSERS)), None) or os.environ.get("BROWSER_PATH")
    found.append(
        Finding(name="browser", state="ok", found=browser, detail="compare.png")
        if browser
        else Finding(
            name="browser",
            state="missing",
            detail="compare.png (with kaleido)",
            fix="install Chrome or Chromium, for example apt-get install chromium",
        )
    )
    peers, purpose = PEERS / "bin" / "python", "bench --cpu beside SAELens"
    found.append(
        Finding(name="peers", state="ok", found=str(PEERS), detail=purpose)
        if peers.exists()
        else Finding(name="peers", state="missing", detail=purpose, fix="make peers (in a checkout)")
    )
    return found


def _system() -> list[Finding]:
    from saebench.assets import cache_dir

    found = [Finding(name="platform", state="ok", found=platform.platform())]
    if (memory := free_memory()) is not None:
        found.append(Finding(name="memory", state="ok", found=f"{human_bytes(memory)} free"))
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    little = {"detail": "less than 1 GiB", "fix": "free some space"} if free < LITTLE_DISK else {}
    found.append(
        Finding(name="disk", state="missing" if little else "ok", found=f"{human_bytes(free)} free", **little)
    )
    cache = existing = cache_dir()
    while not existing.exists():
        existing = existing.parent
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        detail = f"cannot be written ({error.strerror}); it keeps models that are fetched"
        fix = "set SAEBENCH_CACHE to a directory that can be written"
        return [*found, Finding(name="cache", state="missing", found=str(cache), detail=detail, fix=fix)]
    return [*found, Finding(name="cache", state="ok", found=str(cache))]


def _data() -> list[Finding]:
    """The bundled files against their checksums, and what can be fetched."""
    import saebench_data
    from saebench.assets import list_assets

    found = []
    for name in ("demo_model", "text"):
        damaged = saebench_data.damaged_files(name)
        found.append(
            Finding(
                name=name,
                state="broken" if damaged else "ok",
                found=str(saebench_data.FOLDER / name),
                detail=f"missing or damaged: {', '.join(damaged)}" if damaged else None,
                fix="reinstall saebench" if damaged else None,
            )
        )
    if any(finding.state == "broken" for finding in found):
        return found
    for asset in list_assets():
        if asset.command is not None:
            found.append(
                Finding(
                    name=asset.name, state="missing", found=asset.state, detail=asset.description,
                    fix=asset.command,
                )
            )  # fmt: skip
    return found
