"""Every public function has an example in its docstring, and all examples run."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

import saebench as sb
from saebench.activations.cache import ActivationCache
from saebench.sources.models import Model

THINGS = {name: getattr(sb, name) for name in sb.__all__}
THINGS |= {f"figures.{name}": getattr(sb.figures, name) for name in sb.figures.__all__}
FUNCTIONS = {name: thing for name, thing in THINGS.items() if inspect.isfunction(thing)}


def examples() -> list[Any]:
    """All docstrings with examples, including those of the methods of classes; one test each."""
    finder, found = doctest.DocTestFinder(exclude_empty=True), []
    for name, thing in THINGS.items():
        if inspect.isfunction(thing) or inspect.isclass(thing):
            module = importlib.import_module(thing.__module__)
            found += [test for test in finder.find(thing, name, module, {}) if test.examples]
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_cache: ActivationCache) -> Path:
    """A short training."""
    out = tmp_path_factory.mktemp("trained") / "run"
    settings = {"d_sae": 96, "k": 6, "tokens": 2_000, "batch_size": 100, "quiet": True}
    sb.train(cache=tiny_cache.path, out=out, **settings)
    return out


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory, run: Path, tiny_cache: ActivationCache) -> Path:
    out = tmp_path_factory.mktemp("stores") / "store"
    sb.index(run=run, cache=tiny_cache.path, out=out, quiet=True).close()
    return out


@pytest.fixture
def store(indexed: Path) -> Any:
    """Opened for each example: one that publishes would leave the others an older generation."""
    with sb.open_store(indexed) as opened:
        yield opened


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_has_an_example(name: str) -> None:
    assert ">>> " in (FUNCTIONS[name].__doc__ or "")


@pytest.mark.parametrize("example", examples(), ids=lambda test: test.name)
def test_examples_run(
    example: doctest.DocTest, run: Path, tiny_cache: ActivationCache, tiny_model: Model, store: Any,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    example.globs.update(sb=sb, run=run, cache=tiny_cache, model=tiny_model, store=store)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    result = runner.run(example, out=said.append, clear_globs=False)
    assert result.failed == 0, "".join(said)
    assert result.attempted > 0
