"""A model is its weights by tensor, its config and its tokenizer, and nothing else in its folder."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from saebench.core.errors import UserError
from saebench.runs.provenance import require_same_model
from saebench.sources import model_identity
from saebench.sources.model_identity import hashes_of_folder, same_model
from saebench.sources.models import peek_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 with the tokenizer of the demo model."""
    import transformers

    from saebench.assets import resolve_model

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=8192, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in Path(resolve_model("demo")).glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def identity(folder: Path) -> str:
    return hashes_of_folder(folder)[1]


def test_files_that_are_not_the_model_do_not_change_it(model: Path) -> None:
    before = identity(model)
    (model / "notes.txt").write_text("ran well\n")
    (model / "trainer_state.json").write_text("{}\n")
    (model / "generation_config.json").write_text('{"do_sample": true}')
    shutil.copy(model / "model.safetensors", model / "consolidated.safetensors")
    config = json.loads((model / "config.json").read_text())
    config |= {"transformers_version": "9", "_name_or_path": "elsewhere"}
    (model / "config.json").write_text(json.dumps(config, indent=7))
    assert identity(model) == before


def test_the_same_weights_in_other_files_are_the_same_model(model: Path, tmp_path: Path) -> None:
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    other = Path(shutil.copytree(model, tmp_path / "other"))
    (other / "model.safetensors").unlink()
    loaded.save_pretrained(other, max_shard_size="100KB")
    assert len(list(other.glob("*.safetensors"))) > 1
    one, two = hashes_of_folder(model), hashes_of_folder(other)
    assert one[1] == two[1] and one[0] != two[0]
    assert same_model(peek_model(str(model)).to_json(), peek_model(str(other)).to_json())


def flip_byte(folder: Path) -> None:
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)


def scale_attention(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"scale_attn_weights": False}))


def other_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}))


def swapped_names(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    names = ("transformer.h.0.ln_1.bias", "transformer.h.0.attn.c_proj.bias")
    tensors[names[0]] = tensors[names[0]] + 1
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("change", [flip_byte, scale_attention, other_tokenizer, swapped_names])
def test_another_model_is_another_model(model: Path, change: object) -> None:
    before = peek_model(str(model)).to_json()
    change(model)  # type: ignore[operator]
    after = peek_model(str(model))
    assert after.identity != before["identity"]
    with pytest.raises(UserError, match="is not the one that made it"):
        require_same_model(after, before, made="made it", says="it says", way_out="give that")


def test_a_model_recorded_before_is_recognized_by_the_rule_of_then(model: Path) -> None:
    info = peek_model(str(model))
    recorded = {"name": "x", "revision": None, "hash": info.hash}
    require_same_model(info, recorded, made="", says="", way_out="")
    with pytest.raises(UserError):
        require_same_model(info, recorded | {"hash": "0" * 64}, made="", says="", way_out="")


def test_large_files_are_read_once_per_version(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEBENCH_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(model_identity, "_KEPT_BYTES", 1000)
    reads: list[str] = []
    plain = model_identity._read_hashes
    monkeypatch.setattr(
        model_identity, "_read_hashes", lambda path: (reads.append(path.name), plain(path))[1]
    )
    old = time.time() - 60
    for file in model.iterdir():
        os.utime(file, (old, old))
    first = hashes_of_folder(model)
    assert "model.safetensors" in reads
    reads.clear()
    assert hashes_of_folder(model) == first and "model.safetensors" not in reads
    flip_byte(model)  # written now: it may change again within a tick of the clock, so nothing is kept
    second = hashes_of_folder(model)
    assert second[1] != first[1] and reads.count("model.safetensors") == 1
    assert hashes_of_folder(model) == second and reads.count("model.safetensors") == 2
    for kept in (tmp_path / "kept" / "hashes").iterdir():
        kept.write_text('{"version": ')  # a damaged entry is made again
    os.utime(model / "model.safetensors", (old, old))
    assert hashes_of_folder(model) == second


@pytest.mark.parametrize("damage", [b"", b"\xff" * 8, b"\x02\x00\x00\x00\x00\x00\x00\x00[]", b"x" * 50])
def test_a_damaged_file_of_weights_has_a_hash_too(model: Path, damage: bytes) -> None:
    (model / "model.safetensors").write_bytes(damage)
    assert len(identity(model)) == 64


def test_a_cache_is_complete_for_the_same_model_with_other_files_beside_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import saebench as sb

    settings = {"model": str(model), "hook": "blocks.0.hook_resid_post", "out": tmp_path / "cache"}
    settings |= {"tokens": 100, "ctx": 16}
    cache = sb.harvest(**settings)
    (model / "notes.txt").write_text("ran well\n")
    capsys.readouterr()
    again = sb.harvest(**settings)
    assert "complete already" in capsys.readouterr().err and again.hash == cache.hash
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    del manifest["made_from"]["model"]["identity"]  # as version 0.1 has written it
    (tmp_path / "cache" / "manifest.json").write_text(json.dumps(manifest))
    (model / "notes.txt").unlink()
    assert sb.harvest(**settings).hash == cache.hash
    flip_byte(model)
    with pytest.raises(UserError, match="holds a different cache"):
        sb.harvest(**settings)
