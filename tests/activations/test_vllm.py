"""Hidden states that vLLM has written become an ordinary text cache, or are refused with a sentence."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import saebench as sb
from saebench.activations.vllm import _hook_of
from saebench.core.errors import UserError
from saebench.sources.models import Model, load_model
from saebench.sources.text import Document

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> Model:
    return load_model(str(tiny_model_folder))


@pytest.fixture
def write(model: Model, tmp_path: Path) -> Write:
    """``write(layers)`` -> a folder of files as vLLM writes them, of texts of 1 to 50 tokens."""

    def write(layers: Sequence[int], *, n: int = 60, dtype: torch.dtype = torch.float32) -> Path:
        folder = tmp_path / "states"
        folder.mkdir()
        for number in range(n):
            tokens = torch.from_numpy(np.random.default_rng(number).integers(1, 400, number * 7 % 50 + 1))
            save_file(states(model, tokens, layers, dtype), folder / f"request-{number:03d}.safetensors")
        return folder

    return write


def states(model: Model, tokens: torch.Tensor, layers: Sequence[int], dtype: Any) -> dict[str, torch.Tensor]:
    hooks = [_hook_of(layer, model.n_layers) for layer in layers]
    found = model.run_to(tokens[None], hooks)
    return {
        "token_ids": tokens,
        "hidden_states": torch.stack([found[hook][0].to(dtype) for hook in hooks], dim=1).contiguous(),
    }


def arguments(folder: Path, model: Model, out: Path, layers: Sequence[int]) -> dict[str, Any]:
    return {
        "source": folder,
        "format": "vllm",
        "model": model.name,
        "layers": layers,
        "out": out,
        "shard_rows": 32_768,
        "quiet": True,
    }


def test_rows_equal_a_harvest_of_the_same_token_ids(
    model: Model, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write([2, 0, 1])
    imported = sb.import_activations(**arguments(folder, model, tmp_path / "imported", [2, 0, 1]))
    hooks = ["blocks.1.hook_resid_post", "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]
    assert imported.hooks == hooks and imported.manifest["verified"] is True
    assert "not compared" not in capsys.readouterr().err
    computed = model.run_to(imported.context_tokens, hooks)
    for hook in hooks:
        rows = computed[hook][imported.ctx.long(), imported.pos.long()]
        torch.testing.assert_close(imported.activations(hook), rows)
    assert torch.equal(imported.tokens, imported.context_tokens[imported.ctx.long(), imported.pos.long()])
    assert (imported.pos >= 1).all() and imported.n_rows == sum(i * 7 % 50 for i in range(60))
    assert imported.ctx_len == 50
    assert imported.modality.name == "text" and imported.vocab() == model.token_bytes()
    assert imported.doc_labels()[3] == "request-003.safetensors"
    for doc in range(60):
        of_doc = imported.doc == doc
        tokens = tuple(np.random.default_rng(doc).integers(1, 400, doc * 7 % 50 + 1).tolist())
        assert imported.held_out[of_doc].eq(Document("", tokens=tokens).held_out).all()
    assert 0 < imported.held_out.sum() < imported.n_rows / 3
    imported.verify()
    again = sb.import_activations(**arguments(folder, model, tmp_path / "imported", [2, 0, 1]))
    assert again.hash == imported.hash


def test_cache_is_trained_on_evaluated_with_the_model_and_indexed(
    model: Model, write: Write, tmp_path: Path
) -> None:
    settings = arguments(write([1], dtype=torch.bfloat16), model, tmp_path / "imported", [1])
    cache = sb.import_activations(**settings)
    assert cache.dtype == torch.bfloat16 and cache.manifest["verified"] is True
    run = sb.train(cache=cache, out=tmp_path / "run", d_sae=64, k=4, tokens=800, batch_size=200, quiet=True)
    report = sb.evaluate(run, model="cache", quiet=True)
    assert report.n_tokens == int(cache.held_out.sum()) and report.kl > 0
    with sb.index(run=run.path, cache=cache, out=tmp_path / "store", quiet=True) as store:
        assert store.info()["model"] == model.name and len(store.logits(3))
    assert len(sb.features_of("the rights of", run))
    assert len(sb.loss_effects(run, cache, contexts=1, sample=3, quiet=True).features)


def test_compressed_files_give_the_same_rows(model: Model, write: Write, tmp_path: Path) -> None:
    import pyarrow as pa

    folder = write([1, 2], n=30)
    plain = sb.import_activations(**arguments(folder, model, tmp_path / "plain", [1, 2]))
    for path in folder.glob("*.safetensors"):
        with pa.CompressedOutputStream(pa.OSFile(f"{path}.zst", "wb"), "zstd") as file:
            file.write(path.read_bytes())
        path.unlink()
    packed = sb.import_activations(**arguments(folder, model, tmp_path / "packed", [1, 2]))
    assert packed.hooks == plain.hooks
    for name in packed.hooks:
        assert torch.equal(packed.activations(name), plain.activations(name))
    assert torch.equal(packed.held_out, plain.held_out)
    damaged = next(folder.glob("*.zst"))
    damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.raises(UserError, match=rf"{damaged.name} is (damaged|not a whole)"):
        sb.import_activations(**arguments(folder, model, tmp_path / "no", [1, 2]))


def test_contexts_are_cut_at_ctx_and_keep_first_keeps_position_0(
    model: Model, write: Write, tmp_path: Path
) -> None:
    folder = write([0], n=20)
    cache = sb.import_activations(
        **arguments(folder, model, tmp_path / "cut", [0]), ctx=8, keep_first=True, dtype="fp32"
    )
    lengths = [i * 7 % 50 + 1 for i in range(20)]
    assert cache.ctx_len == 8 and cache.n_rows == sum(min(length, 8) for length in lengths)
    assert cache.manifest["left_out"] == {"beyond_ctx": sum(max(0, length - 8) for length in lengths)}
    assert (cache.pos == 0).sum() == cache.n_contexts == 20


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ((1, 2, 0), "those of the layers 0,1,2 of .*; pass --layers 0,1,2"),
        ((2, 0, 1), "pass --layers 0,1,2"),
        ((0, 1), "holds 3 layers, but --layers names 2"),
        ((0, 1, 3), "--layers has 3, but .* has the layers 0 to 2"),
        ((0, 1, 1), "names a layer twice"),
    ],
)
def test_wrong_layers_are_refused_before_anything_is_written(
    model: Model, write: Write, tmp_path: Path, said: tuple[int, ...], sentence: str
) -> None:
    folder = write([0, 1, 2], n=8)
    with pytest.raises(UserError, match=sentence):
        sb.import_activations(**arguments(folder, model, tmp_path / "out", said))
    left = [path.name for path in (tmp_path / "out").rglob("*")] if (tmp_path / "out").exists() else []
    assert left in ([], [".lock"])


def test_states_of_another_model_are_refused_and_no_verify_imports_them(
    model: Model, write: Write, tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    folder = write([1], n=25)
    other = Path(shutil.copytree(tiny_model_folder, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"].flip(0).contiguous()
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    settings = {**arguments(folder, model, tmp_path / "out", [1]), "model": str(other)}
    with pytest.raises(UserError, match="no layer fits better; check --model"):
        sb.import_activations(**settings)
    assert sb.import_activations(**settings, verify=False).manifest["verified"] is False
    (other / "model.safetensors").unlink()
    capsys.readouterr()
    without = sb.import_activations(**{**settings, "out": tmp_path / "without"})
    assert without.manifest["verified"] is False
    assert "was not compared with a forward pass" in capsys.readouterr().err


def test_other_and_damaged_files_are_refused(model: Model, write: Write, tmp_path: Path) -> None:
    folder = write([1], n=6)
    victim = folder / "request-003.safetensors"
    content = victim.read_bytes()

    def refused(sentence: str, **more: Any) -> None:
        with pytest.raises(UserError, match=sentence):
            sb.import_activations(**arguments(folder, model, tmp_path / "out", [1]), **more)
        assert not (tmp_path / "out" / "hook").exists()

    victim.write_bytes(content[:-4])
    refused(r"request-003.safetensors is not a whole safetensors file \(it has")
    header = json.dumps(
        {name: {"dtype": "F32", "data_offsets": [0, 0]} for name in ("token_ids", "hidden_states")}
    )
    victim.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    refused("is not a whole safetensors file .*has no shape")
    victim.write_bytes(b"nonsense, and more of it")
    refused("is not a whole safetensors file")
    save_file({"weights": torch.zeros(3)}, victim)
    refused(r"does not hold the tensors token_ids and hidden_states \(its tensors: weights\)")
    save_file(
        {"token_ids": torch.zeros(4, dtype=torch.int64), "hidden_states": torch.zeros(5, 1, 32)}, victim
    )
    refused(r"token_ids \[4\] and hidden_states \[5, 1, 32\]")
    save_file(
        {"token_ids": torch.zeros(4, dtype=torch.int64), "hidden_states": torch.zeros(4, 1, 16)}, victim
    )
    refused("of width 16, but those of .* have 32; check --model")
    good = {"token_ids": torch.full((4,), 400), "hidden_states": torch.zeros(4, 1, 32)}
    save_file(good, victim)
    refused("token ids outside the vocabulary")
    good["token_ids"][:] = 5
    good["hidden_states"][2] = float("nan")
    save_file(good, victim)
    refused("holds NaN or infinity")
    refused(r"holds NaN or infinity at position 2 of blocks.1.hook_resid_pre", verify=False)
    victim.write_bytes(content)
    (folder / "notes.txt").write_text("mine")
    refused(r"notes.txt is neither a .safetensors nor")
    (folder / "notes.txt").unlink()
    assert sb.import_activations(**arguments(folder, model, tmp_path / "out", [1])).n_rows


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": None}, "needs --model and --layers"),
        ({"layers": ()}, "needs --model and --layers"),
        ({"site": "mine"}, "--site goes with --format array, not with vllm"),
        ({"format": "array"}, "--model goes with --format vllm, not with array"),
        ({"format": "vlm"}, "--format vlm is not a format of activations; there is array, vllm"),
    ],
)
def test_settings_of_the_other_format_are_refused(
    model: Model, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        sb.import_activations(**{**arguments(tmp_path, model, tmp_path / "out", [1]), **change})


@pytest.mark.filterwarnings("ignore:.*cannot be memory-mapped")
def test_killed_import_resumes_to_identical_bytes(
    model: Model, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saebench.activations import writer

    monkeypatch.setattr("saebench.activations.settings._check_shard_rows", lambda _: None)
    folder = write([1, 2])
    settings = {**arguments(folder, model, tmp_path / "killed", [1, 2]), "shard_rows": 256}
    whole = sb.import_activations(**{**settings, "out": tmp_path / "whole"})
    real, count = writer.write_shard, [0]

    def stop(*arguments: Any) -> str:
        count[0] += 1
        if count[0] == 30:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(writer, "write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        sb.import_activations(**settings)
    assert len((tmp_path / "killed" / "journal.json").read_text().splitlines()) > 3
    sb.import_activations(**settings)

    def contents(path: Path) -> dict[str, bytes]:
        return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}

    assert contents(tmp_path / "killed") == contents(whole.path)
    assert json.loads((whole.path / "manifest.json").read_text())["verified"] is True
