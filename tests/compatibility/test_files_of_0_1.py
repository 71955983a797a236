"""Caches, runs and stores that version 0.1 made open, and answer what they answered when they were made.

``files-0.1.tar.xz`` is made by make_files.py; answers and outputs of commands were recorded with the files.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import saebench as sb
from tests.compatibility.scenario import (
    ARCHITECTURES,
    PROMPT,
    Answers,
    ask_about_annotations,
    ask_about_store,
    command,
    describe_cache,
    plain,
)

ARCHIVE = Path(__file__).with_name("files-0.1.tar.xz")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files-of-0-1")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(autouse=True)
def _in_the_folder(unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings that were recorded name the caches as they are seen from there."""
    monkeypatch.chdir(unpacked)


def recorded(name: str) -> Any:
    return json.loads(Path(name).read_text("utf-8"))


def answered(of: object, ask: Callable[[Answers], None]) -> dict[str, Any]:
    """What ``of`` answers now, as JSON keeps it."""
    answers = Answers(of)
    ask(answers)
    return dict(json.loads(json.dumps(answers.kept)))


def run(words: str) -> dict[str, Any]:
    """The output of ``saebench WORDS --json``, which must succeed."""
    code, output, errors = command(f"{words} --json")
    assert code == 0, errors
    return dict(json.loads(output))


def run_folders() -> list[str]:
    """Every run of the archive, one of each architecture and two on activations of the demo model."""
    return [*(f"runs/{sae}" for sae in ARCHITECTURES), "model-runs/topk", "model-runs/mutual-choice"]


def test_the_archive_is_small() -> None:
    assert ARCHIVE.stat().st_size < 2_000_000


@pytest.mark.parametrize("name", ["cache", "cache-array"])
def test_a_cache_holds_the_same_rows_and_facts(name: str) -> None:
    run(f"cache verify {name}")
    found = answered(None, lambda answers: answers.keep(name, lambda: describe_cache(sb.open_cache(name))))
    assert_near(found[name], recorded("answers/caches.json")[name], tolerance=0)


def test_cache_info_says_the_same() -> None:
    assert_near(run("cache info cache"), recorded("commands/harvest.json")["output"], tolerance=0)


@pytest.mark.parametrize("folder", run_folders())
def test_a_run_encodes_rows_as_recorded(folder: str) -> None:
    expected = load_file("codes.safetensors")[folder]
    cache = sb.open_cache("cache-array" if folder.startswith("runs/") else "cache")
    codes = sb.load(folder).encode(cache.activations()[: len(expected)].float()).to_dense()
    # Other instruction sets round otherwise: by 2e-6 of a value between AVX-512 and SSE.
    torch.testing.assert_close(codes, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sae", ARCHITECTURES)
def test_a_run_is_measured_as_recorded(sae: str, tmp_path: Path) -> None:
    copy = shutil.copytree(f"runs/{sae}", tmp_path / sae)
    assert_near(run(f"eval {copy} --cache cache-array"), recorded(f"commands/eval-{sae}.json")["output"])


def test_runs_are_compared_as_recorded() -> None:
    outputs = run("compare " + " ".join(f"runs/{sae}" for sae in ARCHITECTURES))
    assert_near(outputs["rows"], recorded("commands/compare.json")["output"]["rows"], tolerance=0)


def test_a_run_is_measured_with_its_model_and_answers_about_a_prompt(tmp_path: Path) -> None:
    copy = shutil.copytree("model-runs/topk", tmp_path / "topk")
    measured = run(f"eval {copy} --model cache")
    assert_near(measured, recorded("commands/eval-model-topk.json")["output"])
    found = plain(sb.features_of(PROMPT, "model-runs/topk"))
    assert_near(found, recorded("answers/prompts.json")["features_of"])


@pytest.mark.parametrize("sae", ["topk", "mutual-choice"])
def test_a_store_answers_as_recorded(sae: str) -> None:
    with sb.open_store("store", sae) as store:
        features = recorded("settings.json")["features"]
        found = answered(store, lambda answers: ask_about_store(answers, features))
    assert_near(found, recorded(f"answers/store-{sae}.json"), tolerance=0)


def test_annotations_are_as_people_left_them() -> None:
    with sb.open_store("store") as store:
        found = answered(store.annotations, lambda answers: ask_about_annotations(answers, "interesting"))
    assert_near(found, recorded("answers/annotations.json"), tolerance=0)


def test_store_check_finds_nothing_wrong() -> None:
    assert run("store check store --run model-runs/topk --cache cache")["findings"] == []


def test_a_rebuilt_store_has_the_same_tables(tmp_path: Path) -> None:
    copy = shutil.copytree("store", tmp_path / "store")
    run(f"store rebuild {copy}")
    with sb.open_store(copy) as new, sb.open_store("store") as old:
        assert new.generation > old.generation
        assert_same_features(new, old, old.feature_columns)


def test_index_over_the_cache_gives_the_same_features(tmp_path: Path) -> None:
    settings = "--with-context-index --examples 4 --window 12 --model none"
    run(f"index model-runs/topk --cache cache {settings} --out {tmp_path / 'store'}")
    with sb.open_store(tmp_path / "store") as new, sb.open_store("store") as old:
        assert new.info()["sae_hash"] == old.info()["sae_hash"]
        assert_same_features(new, old, [c for c in new.feature_columns if not c.startswith("logit")])


def assert_same_features(new: sb.FeatureStore, old: sb.FeatureStore, columns: list[str]) -> None:
    assert_near(plain(new.features(columns)), plain(old.features(columns)))
    for feature in recorded("settings.json")["features"]:
        assert_near(plain(new.examples(feature)), plain(old.examples(feature)))


@pytest.mark.parametrize("sae", ["topk", "jumprelu"])
def test_a_resumed_run_ends_like_one_that_was_not_stopped(sae: str, tmp_path: Path) -> None:
    run_of = shutil.copytree(f"unfinished/{sae}", tmp_path / sae)
    settings = f"{recorded('settings.json')['training']} {ARCHITECTURES[sae]} --resume"
    done = run(f"train --cache cache-array --sae {sae} {settings} --out {run_of}")
    whole = Path("runs") / sae
    assert_near({**done, "path": ""}, {**recorded(f"commands/train-{sae}.json")["output"], "path": ""})
    assert_near(recorded(str(run_of / "sae.json")), recorded(str(whole / "sae.json")))
    resumed, straight = (load_file(folder / "sae.safetensors") for folder in (run_of, whole))
    assert resumed.keys() == straight.keys()
    for name, weight in straight.items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-4, atol=1e-4)
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (run_of, whole)]
    assert [json.loads(line)["step"] for line in lines[0]] == [json.loads(line)["step"] for line in lines[1]]


def assert_near(found: Any, expected: Any, where: str = "", *, tolerance: float = 1e-4) -> None:
    """``found`` has all that is ``expected``; keys may have been added.

    ``tolerance`` is for numbers that are computed again, perhaps on a processor that rounds otherwise.
    """
    if isinstance(expected, dict):
        assert found.keys() >= expected.keys(), where
        for key, value in expected.items():
            assert_near(found[key], value, f"{where}.{key}", tolerance=tolerance)
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_near(found[i], value, f"{where}[{i}]", tolerance=tolerance)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance, nan_ok=True), where
    else:
        assert found == expected, where
