"""Harvesting text encoders by module path, and folders of models that read no text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import saebench as sb
from saebench.core.errors import UserError

SITE = "encoder.layer.0.output"


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A masked language model of random weights with the tiny model's tokens; its files have no pooler."""
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=400, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.save_pretrained(folder)
    return folder


def harvest(model: Path, text: Path, out: Path, **settings: Any) -> sb.ActivationCache:
    usual = {"site": SITE, "tokens": 600, "ctx": 32, "dtype": "fp32", "quiet": True}
    return sb.harvest(model=str(model), text=str(text), out=out, **usual | settings)


def test_encoder_is_harvested_at_a_module_path_and_padding_changes_nothing(
    bert_folder: Path, tiny_text: Path, tmp_path: Path
) -> None:
    from transformers import AutoModel

    cache = harvest(bert_folder, tiny_text, tmp_path / "cache", site=(SITE, "encoder.layer.1.output"))
    model = AutoModel.from_pretrained(bert_folder).eval()
    for ctx in (0, cache.n_contexts - 1):  # the last one is shorter than 32 tokens
        length = int(cache.context_len[ctx])
        tokens_1T = cache.context_tokens[ctx : ctx + 1, :length].long()
        with torch.no_grad():
            hidden = model(tokens_1T, output_hidden_states=True).hidden_states
        rows = cache.ctx == ctx
        for hook, expected in zip(cache.hooks, hidden[1:], strict=True):
            torch.testing.assert_close(cache.activations(hook)[rows], expected[0][cache.pos[rows].long()])
    assert cache.model["name"] == str(bert_folder) and cache.model["paths"][SITE] == "native"
    assert cache.manifest["format_version"] == 1
    run = sb.train(cache=cache, out=tmp_path / "run", d_sae=32, k=4, tokens=600, batch_size=50, quiet=True)
    with sb.index(run=run, cache=cache, out=tmp_path / "store", quiet=True) as store:
        assert store.examples(0)["tokens"].map(len).sum() > 0
        assert "logit" in store.info()["missing"]


def test_encoder_settings_that_make_no_sense_raise_user_error(
    bert_folder: Path, tiny_text: Path, tmp_path: Path
) -> None:
    for changes, message in [
        ({"site": "encoder.layer.0.outputs"}, "has no module .*did you mean encoder.layer.0.output"),
        ({"site": "blocks.0.hook_resid_post"}, "has no module 'blocks.0.hook_resid_post'"),
        ({"site": "pooler.dense"}, "have no weights of pooler.dense"),
        ({"gradients": True}, "--gradients needs a causal language model"),
    ]:
        with pytest.raises(UserError, match=message):
            harvest(bert_folder, tiny_text, tmp_path / "cache", **changes)


def test_model_that_reads_no_text_is_refused_with_the_way_out(
    tmp_path: Path, tiny_text: Path, tiny_model_folder: Path
) -> None:
    from transformers import T5Config, T5Model, ViTConfig, ViTModel

    vit = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16
    )
    ViTModel(vit).save_pretrained(tmp_path / "vit")
    t5 = T5Config(vocab_size=400, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5Model(t5).save_pretrained(tmp_path / "t5")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_folder / name, tmp_path / "t5" / name)
    for folder, site in (("vit", "layers.0.mlp"), ("t5", "decoder.block.0")):
        with pytest.raises(UserError, match=r"sb\.ModuleSource"):
            harvest(tmp_path / folder, tiny_text, tmp_path / "cache", site=site)


@pytest.mark.parametrize(
    ("kind", "names_its_class"),
    # A Llama whose config names no class is read as a causal language model.
    [
        ("BertModel", True),
        ("BertModel", False),
        ("LlamaModel", True),
        ("LlamaForSequenceClassification", True),
    ],
)
def test_folders_without_a_causal_head_are_harvested_at_module_paths(
    tiny_model_folder: Path, tiny_text: Path, tmp_path: Path, kind: str, names_its_class: bool
) -> None:
    import transformers

    folder = tmp_path / "model"
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    model = model_class(
        model_class.config_class(
            vocab_size=400,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            pad_token_id=0,
        )
    ).eval()
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    if not names_its_class:
        config = json.loads((folder / "config.json").read_text())
        del config["architectures"]
        (folder / "config.json").write_text(json.dumps(config))
    site = "encoder.layer.1.output" if kind == "BertModel" else "layers.1.mlp"
    cache = harvest(folder, tiny_text, tmp_path / "cache", site=site)
    found = []
    part = getattr(model, "model", model).get_submodule(site)
    part.register_forward_hook(lambda _module, _args, out: found.append(out))
    tokens_1T = cache.context_tokens[:1].long()
    with torch.no_grad():
        model(tokens_1T, attention_mask=torch.ones_like(tokens_1T))
    rows = cache.ctx == 0
    torch.testing.assert_close(cache.activations()[rows], found[0][0, cache.pos[rows].long()])
    with pytest.raises(UserError, match="is not a causal language model, so a site is a module path"):
        harvest(folder, tiny_text, tmp_path / "other", site="blocks.0.hook_resid_post")


def test_an_unknown_module_path_names_modules_and_an_unknown_hook_names_hooks(
    tiny_model_folder: Path, tiny_text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"is not a module of .*did you mean [a-z_]+\.\S*mlp"):
        harvest(tiny_model_folder, tiny_text, tmp_path / "cache", site="transformer.h.9.mlp")
    with pytest.raises(UserError, match=r"is not a hook of .*did you mean blocks\.0\.hook_resid"):
        harvest(tiny_model_folder, tiny_text, tmp_path / "cache", site="blocks.0.hook_resid_pst")


def test_the_number_of_rows_above_max_norm_is_printed_also_when_it_is_0(
    tiny_model_folder: Path, tiny_text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hook = "blocks.0.hook_resid_post"
    cache = harvest(tiny_model_folder, tiny_text, tmp_path / "cache", site=hook, max_norm=1e6)
    assert "left_out" not in cache.manifest
    assert "0 rows above --max-norm were left out" in capfd.readouterr().err
