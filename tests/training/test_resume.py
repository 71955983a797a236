"""Killed at any instant and resumed, a run ends with the bytes of an uninterrupted run."""

import json
import multiprocessing
import signal

import pytest

from saebench.core.errors import UserError
from saebench.training import train
from saebench.training.checkpoint import latest_checkpoint

VICTIM = """
import os
from saebench.core import files
from saebench.training import loop
from saebench.training.cuda_graph import GraphedStep

def strike():
    os.kill(os.getpid(), plan["signal"])

def counting_steps(*args, step=GraphedStep.__call__):
    output = step(*args)
    plan["steps"] = plan.get("steps", 0) + 1
    if plan["where"] == "step" and plan["steps"] == plan["at"]:
        strike()  # the step is computed and not yet counted
    return output

def counting_renames(source, target, rename=os.replace):
    name = os.path.basename(target)
    plan["saves"] = plan.get("saves", 0) + name.startswith("step-")
    if plan["where"] == "before rename" and plan["saves"] == plan["at"]:
        strike()
    rename(source, target)
    if plan["where"] == name or (plan["where"] == "after rename" and plan["saves"] == plan["at"]):
        strike()

loop.torch.set_num_threads(1)
GraphedStep.__call__ = counting_steps
files.os.replace = counting_renames
loop.train(**settings)
"""

KILL, TERM, INTERRUPT = int(signal.SIGKILL), int(signal.SIGTERM), int(signal.SIGINT)


def run_victim(settings, **plan):
    """Exit code of a process that trains and sends itself ``plan["signal"]`` at one exact place."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["saebench.training.loop", "safetensors.torch", "pydantic"])
    process = context.Process(target=exec, args=(VICTIM, {"settings": settings, "plan": plan}))
    process.start()
    process.join(250)  # seconds, below the limit of a test
    assert process.exitcode is not None, "the victim hangs"
    return process.exitcode


@pytest.mark.timeout(1800)
def test_killed_at_many_instants_it_ends_with_the_same_bytes(settings, tmp_path, files_of):
    undisturbed = settings | {"out": tmp_path / "undisturbed"}
    assert run_victim(undisturbed, where="nowhere", signal=KILL) == 0
    plans = [
        {"where": "step", "at": 3, "signal": KILL},  # no checkpoint yet: starts from zero
        {"where": "before rename", "at": 2, "signal": KILL},  # a whole checkpoint under its temporary name
        {"where": "step", "at": 4, "signal": TERM},
        {"where": "after rename", "at": 1, "signal": KILL},  # two checkpoints lie there
        {"where": "step", "at": 9, "signal": INTERRUPT},
        {"where": "sae.safetensors", "at": 0, "signal": KILL},  # weights without their description
    ]
    for plan in plans:
        code = run_victim(settings | {"resume": True}, **plan)
        assert code == {KILL: -KILL, TERM: 143, INTERRUPT: 1}[plan["signal"]], plan
        assert not (settings["out"] / "sae.json").exists(), plan
    assert run_victim(settings | {"resume": True}, where="nowhere", signal=KILL) == 0
    assert files_of(settings["out"]) == files_of(tmp_path / "undisturbed")


def test_incomplete_line_of_metrics_is_removed_on_resume(settings, tmp_path, files_of):
    train(**settings)
    again = settings | {"out": tmp_path / "again"}
    assert run_victim(again, where="step", at=45, signal=KILL) == -KILL
    with open(again["out"] / "metrics.jsonl", "a") as file:
        file.write('{"step": 43, "loss": 0.')
    with open(again["out"] / "metrics.csv", "a") as file:
        file.write("43,12")
    train(**again | {"resume": True})
    assert files_of(again["out"]) == files_of(settings["out"])


@pytest.mark.parametrize("damage", [{"train": []}, {"sae": None}, {"cache_hash": 5}, {"train": {"cache": 5}}])
def test_a_damaged_description_ends_in_a_sentence(settings, damage):
    train(**settings)
    file = settings["out"] / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    with pytest.raises(UserError, match=rf"run\.json is damaged: {next(iter(damage))}"):
        train(**settings | {"resume": True})


def test_a_damaged_checkpoint_ends_in_a_sentence(settings):
    assert run_victim(settings, where="step", at=25, signal=KILL) == -KILL
    latest = latest_checkpoint(settings["out"])
    latest.write_bytes(latest.read_bytes()[:100])
    with pytest.raises(UserError, match="delete it to start this run again from zero"):
        train(**settings | {"resume": True})
    latest.unlink()
    train(**settings | {"resume": True})


def test_two_writers_on_one_run_are_refused(settings):
    from saebench.core.files import directory_lock

    with (
        directory_lock(settings["out"], what="the run directory"),
        pytest.raises(UserError, match="another process"),
    ):
        train(**settings)


def test_a_checkpoint_of_an_earlier_version_is_resumed(settings, tmp_path):
    from safetensors.torch import load_file, save_file

    undisturbed = settings | {"out": tmp_path / "undisturbed"}
    train(**undisturbed)
    assert run_victim(settings, where="step", at=25, signal=KILL) == -KILL
    latest = latest_checkpoint(settings["out"])
    tensors = load_file(latest)
    del tensors["sae.dead_when_looked"]
    save_file(tensors, latest)
    train(**settings | {"resume": True})
    name = "sae.safetensors"
    assert (settings["out"] / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_a_flipped_byte_of_a_checkpoint_is_found_and_the_older_one_is_resumed(settings, tmp_path, capsys):
    undisturbed = settings | {"out": tmp_path / "undisturbed"}
    train(**undisturbed)
    assert run_victim(settings, where="after rename", at=2, signal=KILL) == -KILL
    older, newer = sorted((settings["out"] / "checkpoints").iterdir())
    data = bytearray(newer.read_bytes())
    data[-100] ^= 1
    newer.write_bytes(data)
    train(**settings | {"resume": True})
    told = capsys.readouterr().err
    assert f"{newer} is damaged" in told and f"going on from the older {older.name}" in told
    kept = {
        p.name: p.read_bytes() for p in settings["out"].rglob("*") if p.suffix in (".safetensors", ".csv")
    }
    assert kept == {
        p.name: p.read_bytes() for p in undisturbed["out"].rglob("*") if p.suffix in (".safetensors", ".csv")
    }


def test_a_flipped_byte_of_the_weights_is_found(settings):
    import saebench as sb

    train(**settings)
    file = settings["out"] / "sae.safetensors"
    data = bytearray(file.read_bytes())
    data[-7] ^= 4
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"sae\.safetensors is damaged: its SHA-256"):
        sb.load(settings["out"])


def test_lost_lines_of_metrics_give_a_warning_on_resume(settings, capsys):
    assert run_victim(settings, where="step", at=45, signal=KILL) == -KILL
    (settings["out"] / "metrics.csv").unlink()
    lines = (settings["out"] / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (settings["out"] / "metrics.jsonl").write_bytes(lines[0] + b"\0" * 40)
    train(**settings | {"resume": True})
    told = capsys.readouterr().err
    assert "metrics.jsonl has no line for 4 of the 5 logged steps up to the checkpoint at step 40" in told
    assert "metrics.csv has no line for 5 of the 5" in told
    lines = (settings["out"] / "metrics.jsonl").read_bytes().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [7, 42, 49, 56, 60]


def test_a_run_killed_before_its_last_cleaning_is_cleaned_by_the_next_call(settings, files_of):
    train(**settings)
    whole = files_of(settings["out"])
    (last,) = (settings["out"] / "checkpoints").iterdir()
    last.with_name("step-000000050.safetensors").write_bytes(last.read_bytes())
    (settings["out"] / ".sae.json.1.partial").write_bytes(b"half")
    train(**settings | {"resume": True})
    assert files_of(settings["out"]) == whole
