"""Cost of imports, and which packages import which."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import saebench
from tests.layers import EVERYTHING, LAYERS, folder_of, with_table

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "duckdb", "streamlit", "transformer_lens", "transformers", "pandas", "triton", "datasets"}
PACKAGES = ("saebench", "app/saebench_app", "data/saebench_data", "kernels/saebench_kernels")
NEEDED_BY_OTHERS = {"plotly"}
"""Declared but not imported by saebench: Streamlit needs it for charts."""
OF_PEERS = {"sae-lens", "sparsify", "dictionary-learning"}
"""Imported only in the environment of `make peers`, or only if they are installed."""


def modules_after(code: str) -> set[str]:
    """Top-level modules that are loaded after ``code`` ran in a fresh interpreter."""
    program = f"{code}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}}, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["saebench", "saebench.config", "saebench.demo", "saebench.cli.app"])
def test_import_loads_no_heavy_package(module: str) -> None:
    assert not modules_after(f"import {module}") & HEAVY


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["harvest", "--help"], ["tarin"]])
def test_help_and_errors_load_no_heavy_package(words: list[str]) -> None:
    code = "import contextlib, io, saebench.cli\n"
    code += f"with contextlib.redirect_stdout(io.StringIO()): saebench.cli.main({words})"
    assert not modules_after(code) & HEAVY


def test_training_loads_no_heavy_package_except_torch() -> None:
    loaded = modules_after("from saebench.training import train")
    assert not loaded & (HEAVY - {"torch"})


def test_every_public_name_exists() -> None:
    for name in saebench.__all__:
        assert getattr(saebench, name) is not None


def imports_of(folder: Path) -> set[str]:
    """Full names of all modules that the code in ``folder`` imports at any level."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module))
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_imported_from_checkout_and_typed(package: str) -> None:
    found = importlib.util.find_spec(Path(package).name)
    assert found is not None and found.origin is not None
    assert Path(found.origin) == ROOT / package / "__init__.py"
    assert (ROOT / package / "py.typed").is_file()


def test_folders_of_checkout_do_not_shadow_packages() -> None:
    """transformers tries to import ``kernels``, and python -c also imports from the working directory."""
    assert not [folder for folder in ("app", "data", "kernels") if (ROOT / folder / "__init__.py").exists()]
    code = "from transformers import BertForPreTraining"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def requirement_name(requirement: str) -> str:
    return re.split(r"[<>=!~;\[ ]", requirement)[0].lower()


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


def modules() -> dict[str, Path]:
    """Every module of saebench and its file."""
    return {
        ".".join(path.relative_to((ROOT / package).parent).with_suffix("").parts).removesuffix(
            ".__init__"
        ): path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }


def imports_in(path: Path, *, when_type_checking: bool = True) -> set[str]:
    """Full names of the modules, or of names in them, that one file imports at any level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not when_type_checking:
        tree.body = [node for node in tree.body if not is_type_checking(node)]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def package_of(name: str) -> str | None:
    """The package in `LAYERS` that contains a module or a name; None for other distributions."""
    if name.partition(".")[0] not in {Path(package).name for package in PACKAGES}:
        return None
    return max((p for p in LAYERS if name == p or name.startswith(p + ".")), key=len)


def test_packages_import_only_what_layers_allow() -> None:
    broken = set()
    for module, path in modules().items():
        own = package_of(module)
        assert own is not None
        for name in imports_in(path):
            other = package_of(name)
            if other not in {None, own, *LAYERS[own]} and EVERYTHING not in LAYERS[own]:
                broken.add(f"{module} imports {name}")
    assert not broken


def test_layers_have_existing_packages_and_no_cycle() -> None:
    known = {name for name in LAYERS if EVERYTHING not in LAYERS[name]}
    assert {name for allowed in LAYERS.values() for name in allowed} - {EVERYTHING} <= known
    order = list(graphlib.TopologicalSorter({name: LAYERS[name] for name in known}).static_order())
    assert len(order) == len(known)
    for package in LAYERS:
        assert (ROOT / folder_of(package)).exists()


def test_modules_have_no_import_cycle() -> None:
    """Imports inside functions count; imports under TYPE_CHECKING do not."""
    ours = modules()
    graph: dict[str, set[str]] = {}
    for module, path in ours.items():
        names = imports_in(path, when_type_checking=False)
        graph[module] = {n if n in ours else n.rpartition(".")[0] for n in names} & set(ours) - {module}
    # Public names are imported lazily, so using them inside the package does not make a cycle of files.
    graph = {name: used - {"saebench"} for name, used in graph.items() if name != "saebench"}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_contributing_shows_current_layers() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert with_table(text) == text, "run python -m tests.layers"
