"""The demo on a tiny model: its files, repeated calls, and resuming."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import saebench as sb
from saebench.cli import main
from saebench.demo import _snippet

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def words(tiny_model_folder: Path, tiny_text: Path) -> list[str]:
    settings = (
        "--ctx 32 --harvest-tokens 1e5 --d-sae 32 --k 4 --batch-size 128 --eval-tokens 100 --device cpu"
    )
    return [
        "demo",
        "--model",
        str(tiny_model_folder),
        "--text",
        str(tiny_text),
        "--site",
        HOOK,
        *settings.split(),
    ]


@pytest.fixture(scope="module")
def finished(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    assert main([*words, "--tokens", "5e3", "--out", str(out), "--quiet"]) == 0
    return out


def test_demo_writes_cache_run_and_store(finished: Path) -> None:
    assert sb.open_cache(finished / "cache").hooks == [HOOK]
    [run] = (finished / "runs").iterdir()
    report = json.loads((run / "eval.json").read_text())
    assert report["ce_spliced"] > 0
    with sb.open_store(finished / "store") as store:
        assert store.info()["eval"] == report
        assert store.has("logit")


def test_second_call_changes_no_file_and_shows_summary(
    finished: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"}
    call = [*words, "--tokens", "5e3", "--out", str(finished)]
    assert main([*call, "--json"]) == 0
    output = capsys.readouterr()
    assert output.err.count("already done") == 4
    report = json.loads(output.out)
    assert set(report["seconds"]) == {"harvest", "train", "eval", "index"}
    assert report["peak_memory_bytes"] > 2**20
    assert all(len(shown["tokens"]) > 0 and "[" in shown["example"] for shown in report["features"])
    assert main(call) == 0
    shown = capsys.readouterr().out
    assert f"saebench explore {finished / 'store'}" in shown
    assert "explained_variance" in shown
    unchanged = {
        path: path.stat().st_mtime_ns for path in before if path.is_file() and path.name != "demo.json"
    }
    assert unchanged.items() <= before.items()


def test_stage_with_deleted_output_runs_again(
    finished: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / "store" / "manifest.json").unlink()
    assert main([*words, "--tokens", "5e3", "--out", str(finished)]) == 0
    assert capsys.readouterr().err.count("already done") == 3


def test_other_settings_in_same_directory_are_refused(
    finished: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--tokens", "6e3", "--out", str(finished)]) == 2
    assert "--tokens 5000, but this call has 6000" in capsys.readouterr().err


def test_resume_after_sigkill_in_training_gives_identical_weights(
    finished: Path, words: list[str], tmp_path: Path
) -> None:
    call = [*words, "--tokens", "5e3", "--quiet", "--out", str(tmp_path / "out")]
    killed = subprocess.Popen([sys.executable, "-m", "saebench.cli", *call])
    try:
        run = tmp_path / "out" / "runs" / "topk-32-k4"
        while killed.poll() is None and not (run / "run.json").exists():
            time.sleep(0.01)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "store").exists()
    assert main(call) == 0
    weights = "runs/topk-32-k4/sae.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (finished / weights).read_bytes()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--all --d-sae 2048 --k 4 --batch-size 32", "raise --batch-size or --k, lower --d-sae, or"),
        ("--tokens 100", "lower --batch-size or raise --tokens"),
    ],
)
def test_untrainable_settings_are_refused_before_harvest(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, sentence: str
) -> None:
    given = [
        word for pair in zip(words[1::2], words[2::2], strict=True) if pair[0] not in flags for word in pair
    ]
    assert main(["demo", *given, *flags.split(), "--out", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_snippet_puts_token_in_brackets() -> None:
    pieces = [f" {i}" for i in range(30)]
    assert _snippet(pieces, 10, around=2) == "8 9[ 10] 11 12"
    assert _snippet(["a\n\n", "b"], 1) == "a [b]"


def test_demo_all_compares_main_architectures(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    call = [*words, "--all", "--tokens", "5e3", "--out", str(out), "--quiet"]
    assert main([*call, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    labels = [row["label"] for row in report["comparison"]["rows"]]
    assert labels == [
        "feature-choice", "gradient, oracle (sees the next tokens)", "gradient, plain", "gradient, proxy",
        "matching-pursuit", "mutual-choice", "topk",
    ]  # fmt: skip
    assert not report["comparison"]["warnings"]
    assert all(row["mean"]["kl"] is not None for row in report["comparison"]["rows"])
    with sb.open_store(out / "store") as store:
        assert len(store.saes) == 5
    assert main(call) == 0
    assert "mutual-choice" in capsys.readouterr().out
