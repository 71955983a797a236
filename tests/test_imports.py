"""What a module costs to import, and who knows whom."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import saebench

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "duckdb", "streamlit", "transformer_lens", "transformers", "pandas", "triton", "datasets"}
PACKAGES = ("saebench", "app/saebench_app", "data/saebench_data", "kernels/saebench_kernels")
NEEDED_BY_OTHERS = {"plotly"}
"""Declared, not imported by us: Streamlit draws the charts with it."""
OF_PEERS = {"sae-lens", "sparsify", "dictionary-learning"}
"""Imported by what runs in an environment of its own (make peers), or only where they are installed."""


def modules_after(code: str) -> set[str]:
    """Top-level modules that are loaded after ``code`` ran in a fresh interpreter."""
    program = f"{code}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}}, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["saebench", "saebench.config", "saebench.demo", "saebench.cli.app"])
def test_import_is_light(module: str) -> None:
    assert not modules_after(f"import {module}") & HEAVY


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["harvest", "--help"], ["tarin"]])
def test_help_and_complaints_are_light(words: list[str]) -> None:
    code = "import contextlib, io, saebench.cli\n"
    code += f"with contextlib.redirect_stdout(io.StringIO()): saebench.cli.main({words})"
    assert not modules_after(code) & HEAVY


def test_training_needs_little_but_torch() -> None:
    loaded = modules_after("import saebench.training")
    assert not loaded & (HEAVY - {"torch"})


def test_every_public_name_is_there() -> None:
    for name in saebench.__all__:
        assert getattr(saebench, name) is not None


def imports_of(folder: Path) -> set[str]:
    """Full names of all modules that the code in ``folder`` imports, anywhere in it."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module))
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_an_import_name_is_the_path_of_a_folder_with_types(package: str) -> None:
    found = importlib.util.find_spec(Path(package).name)
    assert found is not None and found.origin is not None
    assert Path(found.origin) == ROOT / package / "__init__.py"
    assert (ROOT / package / "py.typed").is_file()


def test_folders_of_the_checkout_are_not_taken_for_packages_of_others() -> None:
    """transformers looks for Hugging Face's ``kernels``, and python -c imports from the working directory."""
    assert not [folder for folder in ("app", "data", "kernels") if (ROOT / folder / "__init__.py").exists()]
    code = "from transformers import BertForPreTraining"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def requirement_name(requirement: str) -> str:
    name = requirement.split(";")[0].split("[")[0]
    return name.rstrip("<>=!~.,0123456789 ").lower()


def test_every_import_is_declared_and_every_dependency_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {requirement_name(line) for line in project["dependencies"]}
    optional = {
        requirement_name(line)
        for extra in ("gpu", "tensorboard", "wandb")
        for line in project["optional-dependencies"][extra]
    }
    distributions = packages_distributions()
    used = set()
    ours = {Path(package).name for package in PACKAGES}
    for folder in PACKAGES:
        for module in imports_of(ROOT / folder):
            top = module.partition(".")[0]
            if top not in sys.stdlib_module_names and top not in ours:
                names = distributions.get(top, [top])
                used.add(names[0].lower().replace("_", "-"))
    assert used - required <= optional | OF_PEERS, "imported but not declared"
    assert required - used <= NEEDED_BY_OTHERS, "declared but not imported"


def test_rooms_know_only_whom_they_may_know() -> None:
    def knows(folder: str, other: str) -> bool:
        return any(name == other or name.startswith(other + ".") for name in imports_of(ROOT / folder))

    assert not any(
        knows("kernels/saebench_kernels", room) for room in ("saebench", "saebench_app", "saebench_data")
    )
    for layer in ("activations", "saes", "training", "evaluation"):
        for above in ("saebench.store", "saebench.cli", "saebench_app"):
            assert not knows(f"saebench/{layer}", above), f"{layer} imports {above}"
    assert not knows("saebench/store", "saebench.training")
    assert not any(
        knows("saebench/analysis", above) for above in ("saebench.cli", "saebench.training", "saebench_app")
    )
    assert not knows("saebench/saes", "saebench.activations")
    for folder in PACKAGES:
        assert not any(knows(folder, bare) for bare in ("app", "data", "kernels"))
