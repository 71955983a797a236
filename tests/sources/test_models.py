"""Models of transformers: activations equal those of transformers, and load errors are explained."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from saebench.core.errors import UserError
from saebench.sources.models import load_model, peek_model
from tests.conftest import TINY_VOCABULARY


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    return load_model(str(tiny_model_folder))


@pytest.fixture(scope="module")
def huggingface(tiny_model_folder):
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(tiny_model_folder).eval()


@pytest.fixture(scope="module")
def tokens_BT():
    return torch.randint(0, TINY_VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def copy(tiny_model_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "copy"))


def test_activations_and_logits_equal_transformers(model, huggingface, tokens_BT):
    with torch.no_grad():
        expected = huggingface(tokens_BT, output_hidden_states=True)
    torch.testing.assert_close(model.logits(tokens_BT), expected.logits)
    found = model.run_to(tokens_BT, ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"])
    torch.testing.assert_close(found["blocks.0.hook_resid_pre"], expected.hidden_states[0])
    torch.testing.assert_close(found["blocks.0.hook_resid_post"], expected.hidden_states[1])


@pytest.mark.parametrize(
    ("hook", "blocks", "unembeds"),
    [("hook_embed", 0, 0), ("blocks.0.hook_resid_post", 1, 0), ("blocks.1.attn.hook_z", 1, 0)],
)
def test_layers_after_the_hook_are_not_computed(model, tokens_BT, hook, blocks, unembeds):
    counts = {"mlp": 0, "unembed": 0}

    def count(name):
        return lambda *_: counts.update({name: counts[name] + 1})

    handles = [block.mlp.register_forward_hook(count("mlp")) for block in model.module.transformer.h]
    handles.append(model.module.lm_head.register_forward_hook(count("unembed")))
    model.run_to(tokens_BT, [hook])
    for handle in handles:
        handle.remove()
    assert counts == {"mlp": blocks, "unembed": unembeds}


def test_usual_hooks_exist_with_predicted_widths(model):
    usual = model.info.usual_hooks()
    found = model.run_to(torch.zeros(1, 3, dtype=torch.long), list(usual))
    assert {hook: value.shape[-1] for hook, value in found.items()} == usual
    assert set(usual) <= set(model.hook_names())


@pytest.mark.parametrize(
    "hook", ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z", "blocks.1.hook_mlp_out"]
)
def test_edit_replaces_the_activation(model, tokens_BT, hook):
    clean = model.logits(tokens_BT)
    seen = model.run_to(tokens_BT, [hook])[hook]
    torch.testing.assert_close(model.logits(tokens_BT, edit={hook: lambda x: seen}), clean)
    zeroed = model.logits(tokens_BT, edit={hook: torch.zeros_like})
    assert not torch.allclose(zeroed, clean, atol=1e-4)
    torch.testing.assert_close(model.logits(tokens_BT), clean)


def test_unembedding_gives_logits_up_to_a_constant(model, tokens_BT):
    x_BTD = model.run_to(tokens_BT, ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"]
    scale = (x_BTD.var(dim=-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    logits = model.logits(tokens_BT)
    expected = logits - logits.mean(dim=-1, keepdim=True)
    torch.testing.assert_close(x_BTD / scale @ model.unembedding(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.final_scale(tokens_BT), scale[..., 0])


def test_token_bytes_spell_the_text(model):
    text = "Fellow citizens,\n naïve 漢字 \x00 1862!"
    table = model.token_bytes()
    assert len(table) == model.vocab_size == TINY_VOCABULARY
    assert b"".join(table[i] for i in model.tokens.encode(text)).decode() == text
    assert table[0] == b"<|endoftext|>"
    assert not model.tokens.adds_bos()


def test_llama_model_with_grouped_heads_and_rms_norm(tmp_path, tiny_model_folder, tokens_BT):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "llama"))
    config = LlamaConfig(
        vocab_size=TINY_VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    llama = LlamaForCausalLM(config)
    llama.model.norm.weight.data.normal_(1, 0.2)
    llama.save_pretrained(folder)
    model = load_model(str(folder))
    usual = model.info.usual_hooks()
    found = model.run_to(tokens_BT, list(usual))
    assert {hook: value.shape[-1] for hook, value in found.items()} == usual
    x_BTD = found["blocks.1.hook_resid_post"]
    scale = (x_BTD.square().mean(dim=-1, keepdim=True) + config.rms_norm_eps).sqrt()
    logits = model.logits(tokens_BT)
    expected = logits - logits.mean(dim=-1, keepdim=True)
    torch.testing.assert_close(x_BTD / scale @ model.unembedding(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.final_scale(tokens_BT), scale[..., 0])


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("blocks.1.hook_resid_pos", "did you mean blocks.1.hook_resid_post"),
        ("blocks.2.hook_resid_post", "beyond the 2 layers"),
        ("nonsense", "did you mean"),
        ("", "did you mean"),
    ],
)
def test_unknown_hook_raises_before_the_model_is_loaded(tiny_model_folder, hook, message):
    with pytest.raises(UserError, match=message):
        peek_model(str(tiny_model_folder)).check_hook(hook)


def test_hook_without_one_vector_per_token_raises_user_error(model, tokens_BT):
    with pytest.raises(UserError, match="one vector per token"):
        model.run_to(tokens_BT, ["blocks.0.attn.hook_pattern"])
    with pytest.raises(UserError, match="is not a hook"):
        model.run_to(tokens_BT, ["blocks.0.mlp.hook_nothing"])


def test_hash_depends_on_file_contents(tiny_model_folder, copy):
    one, two = peek_model(str(tiny_model_folder)), peek_model(str(copy))
    assert one.hash == two.hash
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-6}))
    assert peek_model(str(copy)).hash != one.hash


def test_missing_files_raise_user_error(copy):
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        load_model(str(copy))
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="--revision"):
        load_model(str(copy), revision="main")
    (copy / "config.json").write_text('{"model_type": "gpt2", "n_layer": "x"}')
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(str(copy))
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(str(copy))


def test_damaged_files_raise_user_error(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cannot be loaded|damaged"):
        load_model(str(copy))
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer"):
        load_model(str(copy))


def test_missing_weights_raise_user_error(copy):
    """transformers itself fills a missing layer with random numbers and only logs it."""
    config = json.loads((copy / "config.json").read_text())
    layers = "n_layer" if "n_layer" in config else "num_hidden_layers"
    (copy / "config.json").write_text(json.dumps({**config, layers: config[layers] + 1}))
    with pytest.raises(UserError, match=r"lack \d+ tensors .*h\.2\."):
        load_model(str(copy))


def test_tokenizer_with_too_large_ids_raises_user_error(copy):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=1)).save_pretrained(copy)
    with pytest.raises(UserError, match=r"has token 399, .* ends at 299"):
        load_model(str(copy))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "code.Own"}}),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}},
        ),
    ],
)
def test_remote_code_is_neither_run_nor_asked_about(copy, monkeypatch, file, change):
    (copy / "code.py").write_text(f"open({str(copy / 'ran')!r}, 'w')\nclass Own: pass\n")
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | change))
    calls = []
    monkeypatch.setattr("builtins.input", lambda question: calls.append(question) or "y")
    with contextlib.suppress(UserError):  # with a tokenizer.json the class is not needed
        load_model(str(copy))
    assert not calls and not (copy / "ran").exists()


def test_unreachable_hub_raises_user_error():
    with pytest.raises(UserError, match=r"hub cannot be reached|downloads nothing"):
        load_model("someone/some-model-that-is-not-here")
    with pytest.raises(UserError, match="does not exist"):
        load_model("./no/such/folder")


def test_hub_download_is_safetensors_only_and_records_the_commit(monkeypatch, tiny_model_folder, tmp_path):
    commit = Path(shutil.copytree(tiny_model_folder, tmp_path / "c0ffee"))
    calls = []

    def snapshot_download(name, *, revision, allow_patterns):
        calls.append((name, revision, tuple(allow_patterns)))
        return str(commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = load_model("someone/tiny", revision="main")
    assert model.info.to_json() == {"name": "someone/tiny", "revision": "c0ffee", "hash": model.hash}
    assert calls == [
        ("someone/tiny", "main", ("*.json", "*.jinja", "*.model", "*.txt")),
        ("someone/tiny", "c0ffee", ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors")),
    ]
