"""``Run``: its files, its SAE, and the recorded origin of the SAE."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import saebench as sb
from saebench.activations.cache import ActivationCache
from saebench.core.errors import UserError
from saebench.runs.layout import RUN_FILE
from saebench.runs.provenance import ContextSettings, contexts_of_import
from saebench.runs.run import Run, find_run
from saebench.saes.files import SPEC_FILE, weights_hash

TEXT = "The state of the union is strong."


@pytest.fixture
def home(tmp_path: Path, tiny_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a harvested cache and a run trained on it, both named by relative paths."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_cache.path, "cache")
    sb.train(cache="cache", hook="blocks.1.hook_resid_post", out="runs/a", d_sae=32, k=4, tokens=600,
             batch_size=200, quiet=True)  # fmt: skip
    return tmp_path


def as_version_0_1(run: Path) -> None:
    """Remove what saebench 0.1 did not record."""
    for name in (RUN_FILE, SPEC_FILE):
        facts = json.loads((run / name).read_text())
        facts.pop("contexts")
        if name == SPEC_FILE:
            facts.pop("cache_hash")
        (run / name).write_text(json.dumps(facts))


def harvest_again(model: Path, text: Path, **settings: object) -> None:
    """Replace the cache with other activations."""
    shutil.rmtree("cache")
    given = {"hook": "blocks.1.hook_resid_post", "tokens": 1_000_000, "dtype": "fp32", "quiet": True}
    sb.harvest(model=str(model), text=str(text), out="cache", **given, **settings)


def test_run_and_sae_files_record_context_settings_and_cache_hash(home: Path) -> None:
    expected = ContextSettings(ctx=32, bos=False, keep_first=False, keep_last=True)
    for name in (RUN_FILE, SPEC_FILE):
        recorded = json.loads((home / "runs" / "a" / name).read_text())
        found = ContextSettings.from_json(recorded["contexts"])
        assert (found.ctx, found.bos, found.keep_first, found.keep_last) == (
            expected.ctx, expected.bos, expected.keep_first, expected.keep_last
        )  # fmt: skip
        assert recorded["cache_hash"] == sb.open_cache("cache").hash


def test_contexts_are_known_after_cache_is_deleted_and_run_is_copied(
    home: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = sb.features_of(TEXT, "runs/a")
    before = Run("runs/a").contexts()
    shutil.rmtree("cache")
    shutil.copytree("runs/a", elsewhere := tmp_path_factory.mktemp("elsewhere") / "copy")
    monkeypatch.chdir(elsewhere.parent)
    assert sb.features_of(TEXT, "copy").equals(here)
    (elsewhere / RUN_FILE).unlink()  # a folder with an SAE alone
    assert Run("copy").contexts() == before


def test_cache_is_found_from_another_working_directory(
    home: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert Run(home / "runs" / "a").open_cache().hash == sb.open_cache(home / "cache").hash


def test_run_of_version_0_1_reads_contexts_from_its_cache_or_is_refused(home: Path) -> None:
    run = home / "runs" / "a"
    here = sb.features_of(TEXT, run)
    as_version_0_1(run)
    assert sb.features_of(TEXT, run).equals(here)
    shutil.move("cache", "moved")
    with pytest.raises(
        UserError, match=r"0\.1.* did not record .*BOS.* cache does not exist .* bos=True or bos=False"
    ):
        sb.features_of(TEXT, run)
    assert sb.features_of(TEXT, run, bos=False).equals(here)


def test_cache_with_changed_contents_is_refused(home: Path, tiny_model_folder: Path, tiny_text: Path) -> None:
    harvest_again(tiny_model_folder, tiny_text, ctx=16)
    for ask in (
        lambda: sb.evaluate("runs/a", quiet=True),
        lambda: sb.absorbed("runs/a", quiet=True),
        lambda: sb.loss_effects("runs/a", contexts=1, sample=2, quiet=True),
    ):
        with pytest.raises(UserError, match=r"which has changed since .* name the cache"):
            ask()
    assert not Run("runs/a").eval_file().exists()


def test_named_cache_of_another_model_is_used_with_warning(
    home: Path, tiny_model_folder: Path, tiny_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    other = shutil.copytree(tiny_model_folder, home / "other")
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(other)
    harvest_again(other, tiny_text, ctx=32)
    for ask in (
        lambda: sb.evaluate("runs/a", cache="cache", quiet=True),
        lambda: sb.index(run="runs/a", cache="cache", out="store", quiet=True).close(),
        lambda: sb.absorbed("runs/a", cache="cache", quiet=True),
    ):
        capsys.readouterr()
        ask()
        assert "warning: cache holds activations of" in capsys.readouterr().err


def test_find_run_matches_hash_of_weights(home: Path) -> None:
    run = Run("runs/a")
    info = {"sae_hash": weights_hash(run.sae), "sae": "topk", "d_in": 32, "d_sae": 32}
    assert find_run([Run("cache"), run], info) is run
    assert run.is_indexed_as({"sae_hash": info["sae_hash"]})
    assert not run.is_indexed_as({**info, "d_sae": 64})
    assert find_run([run], {**info, "sae_hash": "0" * 64}) is None
    (home / "runs" / "a" / SPEC_FILE).write_text("{")
    assert find_run([run], info) is None


def test_run_reports_its_files_and_state(home: Path) -> None:
    run = Run("runs/a")
    assert run.is_training_directory and run.is_finished
    assert run.evaluation() is None and len(run.metrics()) and len(run.sessions()) == 1
    [checkpoint] = run.checkpoints()
    assert (
        Run(checkpoint).path == run.path and Run(checkpoint).provenance.hook_name == run.provenance.hook_name
    )
    assert run.spec.k == 4 and run.sae.d_sae == 32
    sb.evaluate(run, quiet=True)
    assert run.evaluation() is not None
    assert not Run("cache").is_training_directory and not Run("cache").is_finished


@pytest.mark.parametrize(
    ("imported", "expected"),
    [
        ({}, None),
        ({"prepend_bos": True, "context_size": 24, "seqpos_slice": [1, None]}, (24, True, False)),
        ({"prepend_bos": False, "seqpos_slice": [None]}, (None, False, True)),
        ({"seqpos_slice": [0, None]}, (None, None, True)),
        ({"context_size": "many", "prepend_bos": 1, "seqpos_slice": "all"}, (None, None, True)),
        ({"context_size": -3}, (None, None, None)),
    ],
)
def test_context_settings_are_read_from_saelens_metadata(imported, expected) -> None:
    found = contexts_of_import(imported)
    assert (found and (found.ctx, found.bos, found.keep_first)) == expected
