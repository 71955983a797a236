"""What a module costs to import, and which packages import which."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
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
def test_help_and_errors_are_light(words: list[str]) -> None:
    code = "import contextlib, io, saebench.cli\n"
    code += f"with contextlib.redirect_stdout(io.StringIO()): saebench.cli.main({words})"
    assert not modules_after(code) & HEAVY


def test_training_needs_little_but_torch() -> None:
    loaded = modules_after("from saebench.training import train")
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


def modules() -> dict[str, Path]:
    """Every module of ours and its file."""
    return {
        ".".join(path.relative_to((ROOT / package).parent).with_suffix("").parts).removesuffix(
            ".__init__"
        ): path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }


def imports_in(path: Path, *, when_type_checking: bool = True) -> set[str]:
    """Full names of the modules, or of what they hold, that one file imports, anywhere in it."""
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
    """The package of `LAYERS` that a module or a name in one belongs to; None for other people's."""
    if name.partition(".")[0] not in {Path(package).name for package in PACKAGES}:
        return None
    return max((p for p in LAYERS if name == p or name.startswith(p + ".")), key=len)


def test_every_package_imports_only_what_the_table_of_layers_allows() -> None:
    broken = set()
    for module, path in modules().items():
        own = package_of(module)
        assert own is not None
        for name in imports_in(path):
            other = package_of(name)
            if other not in {None, own, *LAYERS[own]} and EVERYTHING not in LAYERS[own]:
                broken.add(f"{module} imports {name}")
    assert not broken


def test_the_table_of_layers_has_no_package_twice_and_no_circle() -> None:
    known = {name for name in LAYERS if EVERYTHING not in LAYERS[name]}
    assert {name for allowed in LAYERS.values() for name in allowed} - {EVERYTHING} <= known
    order = list(graphlib.TopologicalSorter({name: LAYERS[name] for name in known}).static_order())
    assert len(order) == len(known)
    for package in LAYERS:
        assert (ROOT / folder_of(package)).exists()


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions count as well; those for type checkers alone do not."""
    ours = modules()
    graph: dict[str, set[str]] = {}
    for module, path in ours.items():
        names = imports_in(path, when_type_checking=False)
        graph[module] = {n if n in ours else n.rpartition(".")[0] for n in names} & set(ours) - {module}
    # The public names are imported when they are used: what uses them from inside is not a circle of files.
    graph = {name: used - {"saebench"} for name, used in graph.items() if name != "saebench"}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_contributing_shows_the_table_of_layers() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert with_table(text) == text, "run python -m tests.layers"
