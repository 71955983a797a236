"""Harvesting: rows equal the model's activations, and a killed harvest resumes to the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import saebench as sb
from saebench.core.errors import UserError
from saebench.sources.text import is_held_out, read_documents

HOOK = "blocks.0.hook_resid_post"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def settings(tiny_model_folder, tiny_text, tmp_path) -> dict:
    return {
        "model": str(tiny_model_folder),
        "text": str(tiny_text),
        "hook": (HOOK,),
        "tokens": 500,
        "ctx": 32,
        "out": tmp_path / "cache",
        "batch_size": 4,
        "shard_rows": 32_768,
        "quiet": True,
    }


def contents(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_rows_equal_the_model_activations(tiny_cache, tiny_model_folder):
    cache = tiny_cache
    model = sb.load_model(str(tiny_model_folder))
    found = model.run_to(cache.context_tokens, cache.hooks)
    for hook in cache.hooks:
        torch.testing.assert_close(cache.activations(hook), found[hook][cache.ctx.long(), cache.pos.long()])
    assert torch.equal(cache.tokens, cache.context_tokens[cache.ctx.long(), cache.pos.long()])
    assert cache.model["hash"] == model.hash
    assert cache.vocab() == model.token_bytes()
    cache.verify()


def test_columns_locate_each_row_in_its_document(tiny_cache, tiny_text):
    cache = tiny_cache
    documents = list(read_documents(str(tiny_text)))
    vocab = cache.vocab()
    lengths = cache.context_len
    assert cache.ctx_len == 32
    assert cache.n_rows == (lengths - 1).sum()
    assert (cache.pos >= 1).all()
    assert (cache.pos < lengths[cache.ctx.long()]).all()
    keys = cache.ctx.long() * 32 + cache.pos
    assert (keys.diff() > 0).all()
    assert cache.doc_labels() == [document.label for document in documents]
    for number, document in enumerate(documents):
        mine = cache.doc == number
        assert (cache.held_out[mine] == is_held_out(document.text)).all()
        spelled = b"".join(vocab[i] for i in cache.tokens[mine].tolist() if i != 0)
        # Position 0 of each context has no row, so parts of the text are missing from the rows.
        assert len(spelled) <= len(document.text.encode())
    assert 0 < cache.held_out.sum() < cache.n_rows / 3
    for context in range(cache.n_contexts):
        assert len(cache.held_out[cache.ctx == context].unique()) == 1


def test_heads_are_stored_with_their_axes_in_format_2(settings):
    hooks = ("blocks.0.attn.hook_z", HOOK)
    cache = sb.harvest(**{**settings, "hook": hooks, "dtype": "fp32"})
    assert cache.manifest["format_version"] == 2 and cache.modality.name == "text"
    assert cache.sites[hooks[0]].axes == (("head", 4), ("d_head", 8))
    assert cache.sites[HOOK].axes == (("d", 32),)
    native = cache.activations(hooks[0], native=True)
    assert native.shape == (500, 4, 8)
    found = sb.load_model(settings["model"]).run_to(cache.context_tokens, hooks)[hooks[0]]
    torch.testing.assert_close(native.flatten(1), found[cache.ctx.long(), cache.pos.long()])


def test_keep_first_keeps_position_0(settings):
    cache = sb.harvest(**settings, keep_first=True)
    assert (cache.pos == 0).sum() == cache.n_contexts
    assert cache.manifest["made_from"]["settings"]["keep_first"] is True


def test_bos_always_begins_every_context(settings):
    cache = sb.harvest(**settings, bos="always")
    assert (cache.context_tokens[:, 0] == 0).all()
    assert cache.n_rows == 500


def test_equal_harvests_give_equal_bytes_and_a_complete_one_is_opened(settings, tmp_path, capsys):
    first = sb.harvest(**settings)
    assert first.n_rows == 500
    second = sb.harvest(**{**settings, "out": tmp_path / "elsewhere"})
    assert contents(first.path) == contents(second.path)
    again = sb.harvest(**{**settings, "quiet": False})
    assert again.hash == first.hash
    assert "complete already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ctx": 64}, r"its settings\.ctx is 32, not 64"),
        ({"hook": ("blocks.1.hook_resid_post",)}, r"its settings\.hook is"),
    ],
)
def test_other_harvest_into_the_same_directory_raises_user_error(settings, change, message):
    cache = sb.harvest(**settings)
    before = contents(cache.path)
    with pytest.raises(UserError, match=message):
        sb.harvest(**{**settings, **change})
    assert contents(cache.path) == before


def test_directory_with_other_files_raises_user_error(settings):
    settings["out"].mkdir()
    (settings["out"] / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        sb.harvest(**settings)
    assert list(contents(settings["out"])) == ["thesis.tex"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hook": ("blocks.0.hook_resid_pos",)}, "did you mean blocks.0.hook_resid_post"),
        ({"hook": ("blocks.2.hook_resid_post",)}, "beyond the 2 layers"),
        ({"ctx": 65}, "reads at most 64"),
        ({"tokens": 10**15, "shard_rows": 2**40}, "free some space"),
        ({"device": "tpu"}, "not a device"),
        ({"text": "./missing.txt"}, "does not exist"),
        ({"column": "body"}, "no column 'body'"),
    ],
)
def test_invalid_settings_raise_user_error_and_leave_no_cache(settings, change, message):
    with pytest.raises(UserError, match=message):
        sb.harvest(**{**settings, **change})
    assert not set(contents(settings["out"])) - {".lock"}
    assert sb.harvest(**settings).n_rows == 500


def test_unreadable_text_raises_before_the_model_is_loaded(settings, tmp_path, monkeypatch):
    def load_model(*_: object, **__: object) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr("saebench.activations.text_source.load_model", load_model)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "numbers.jsonl").write_text('{"text": 5}\n')
    for name, message in (("empty.txt", "has no document with text"), ("numbers.jsonl", "is int, not text")):
        with pytest.raises(UserError, match=message):
            sb.harvest(**{**settings, "text": str(tmp_path / name)})
    assert not settings["out"].exists()


def test_nonfinite_activations_raise_user_error(settings, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(settings["model"], tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wpe.weight"][7, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=rf"activations at {HOOK} hold NaN or infinity \(context 0, position \d+\)"
    ):
        sb.harvest(**{**settings, "model": str(folder)})
    weights["transformer.wpe.weight"][7, 3] = 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="try --dtype fp32"):
        sb.harvest(**{**settings, "model": str(folder), "dtype": "fp16"})


def test_short_text_gives_fewer_rows_with_a_warning(settings, capsys):
    cache = sb.harvest(**{**settings, "tokens": 10**6})
    assert 0 < cache.n_rows < 10**6
    assert f"ended after {cache.n_rows:,} of the 1,000,000 rows" in capsys.readouterr().err
    text = Path(settings["out"].parent / "one.txt")
    text.write_text("One document only.")
    cache = sb.harvest(**{**settings, "text": str(text), "out": settings["out"].parent / "one"})
    assert "none of the" in capsys.readouterr().err
    assert cache.n_rows > 3


def test_second_writer_raises_user_error(settings):
    from saebench.core.files import directory_lock

    with (
        directory_lock(settings["out"], what="the activation cache"),
        pytest.raises(UserError, match="another process is writing"),
    ):
        sb.harvest(**settings)


KILLER = """
import json, os, resource, signal, stat, sys
import datasets, torch, transformer_lens, transformers.models.gpt2.modeling_gpt2  # once, not per child
import saebench as sb
from saebench.activations import harvest
from saebench.core import files
from saebench.core.errors import UserError
torch.set_num_threads(1)
sb.activations.settings._check_shard_rows = lambda _: None

def attempt(settings, disturb=None):
    pid = os.fork()
    if pid == 0:
        try:
            if disturb:
                disturb()
            sb.harvest(**settings)
            os._exit(0)
        except UserError as error:
            print(error, flush=True)
            os._exit(2)
        except BaseException:
            import traceback; traceback.print_exc()
            os._exit(1)
    return os.waitpid(pid, 0)[1]

def at_rename(n, when):
    # SIGKILL just before or after the n-th rename of a finished file.
    def disturb():
        real, count = os.replace, [0]
        def replace(*paths):
            count[0] += 1
            if count[0] == n and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            real(*paths)
            if count[0] == n:
                os.kill(os.getpid(), signal.SIGKILL)
        os.replace = replace
    return disturb

def file_limit(n_bytes):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))

def full_disk(n):
    def disturb():
        real, count = os.fsync, [0]
        def fsync(descriptor):
            count[0] += not stat.S_ISDIR(os.fstat(descriptor).st_mode)
            if count[0] >= n:
                raise OSError(28, "No space left on device")
            real(descriptor)
        os.fsync = fsync
    return disturb

settings = json.loads(sys.argv[1])
assert attempt({**settings, "out": settings["out"] + "/whole"}) == 0
killed = {**settings, "out": settings["out"] + "/killed"}
for n, when in [(4, "before"), (8, "after"), (12, "before")]:  # python -m tests.torture has many more
    assert attempt(killed, at_rename(n, when)) == signal.SIGKILL, (n, when)
assert attempt(killed) == 0
full = {**settings, "out": settings["out"] + "/full"}
assert attempt(full, file_limit(300_000)) >> 8 == 2
assert attempt(full, full_disk(11)) >> 8 == 2
journal = open(full["out"] + "/journal.json").read()
assert journal.count("group") == 1, journal
assert attempt(full) == 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize(
    "further",
    [
        {"max_norm": 1.05, "exclude_tokens": ["special"]},
        pytest.param({"gradients": False}, marks=pytest.mark.slow),
        pytest.param({"gradients": True}, marks=pytest.mark.slow),
    ],
)
def test_resume_after_kill_or_full_disk_gives_identical_bytes(tiny_model_folder, tmp_path, further):
    settings = {
        **further,
        "model": str(tiny_model_folder),
        "text": "sotu",
        "hook": [HOOK],
        "tokens": 17_500,
        "ctx": 64,
        "batch_size": 64,
        "out": str(tmp_path),
        "shard_rows": 8192,
        "quiet": True,
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLER, json.dumps(settings)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("no space left while writing") == 2, ran.stdout
    whole = contents(tmp_path / "whole")
    assert contents(tmp_path / "killed") == whole
    assert contents(tmp_path / "full") == whole
    sb.open_cache(tmp_path / "killed").verify()
