"""The examples in the docstrings of a store run."""

from __future__ import annotations

import doctest
import importlib

import pytest

import saebench as sb
from saebench.store import FeatureStore, intervals, open_store
from saebench.store.annotations import Annotations
from tests.store.small_store import build_small_store

EXAMPLES = [
    test
    for thing in (
        FeatureStore,
        Annotations,
        sb.export_store,
        intervals.wilson,
        intervals.standard_error,
    )
    for test in doctest.DocTestFinder().find(thing, module=importlib.import_module(thing.__module__))
    if test.examples
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    directory = tmp_path_factory.mktemp("examples")
    metrics = directory / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n')
    with open_store(build_small_store(directory / "store", metrics=metrics)) as opened:
        yield opened


def test_docstrings_have_examples():
    assert len(EXAMPLES) >= 30


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name)
def test_docstring_example_runs(example, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example.globs.update(sb=sb, store=store)
    said = []
    result = doctest.DocTestRunner().run(example, out=said.append, clear_globs=False)
    example.globs.clear()
    assert result.failed == 0, "".join(said)
