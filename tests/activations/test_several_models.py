"""Harvesting several models over one text: aligned rows, and models that cannot be aligned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import saebench as sb
from saebench.core.errors import UserError

HOOK, OTHER = "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A model with the tokenizer of the tiny one, other weights, a smaller width and a padded vocabulary."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = Path(shutil.copytree(tiny_model_folder, tmp_path_factory.mktemp("models") / "other"))
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=448, n_positions=48, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(tiny_model_folder: Path, other_folder: Path, tiny_text: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": (str(tiny_model_folder), str(other_folder)),
        "text": str(tiny_text),
        "hook": (HOOK, OTHER),
        "tokens": 700,
        "ctx": 32,
        "dtype": "fp32",
        "out": tmp_path / "cache",
        "quiet": True,
    }


def test_rows_of_both_models_are_of_the_same_tokens(settings: dict[str, Any], tmp_path: Path) -> None:
    both = sb.harvest(**settings)
    assert both.hooks == [f"0:{HOOK}", f"0:{OTHER}", f"1:{HOOK}", f"1:{OTHER}"]
    for number, name in enumerate(settings["model"]):
        one = sb.harvest(**{**settings, "model": name, "out": tmp_path / str(number)})
        assert one.manifest["format_version"] == 1 and one.hooks == [HOOK, OTHER]
        for hook in one.hooks:
            assert torch.equal(both.activations(f"{number}:{hook}"), one.activations(hook))
            assert both.model_of(f"{number}:{hook}") == one.model == one.model_of(hook)
            assert both.hook_of(f"{number}:{hook}") == hook == one.hook_of(hook)
        assert torch.equal(both.tokens, one.tokens) and torch.equal(both.ctx, one.ctx)
        assert both.vocab() == one.vocab()[:400]
    assert both.manifest["format_version"] == 2 and both.modality.name == "text"
    assert both.model is None and [model["name"] for model in both.models] == list(settings["model"])
    assert (both.path / "hook" / f"0%3A{HOOK}").is_dir()
    both.verify()
    assert sb.harvest(**settings).hash == both.hash


def test_sae_on_a_site_of_the_second_model_is_trained_evaluated_and_indexed(settings: dict[str, Any]) -> None:
    out = settings["out"].parent
    cache = sb.harvest(**{**settings, "tokens": 5000, "hook": ("blocks.1.hook_resid_post",)})
    run = sb.train(
        cache=cache, hook="1:blocks.1.hook_resid_post", out=out / "run", d_sae=32, k=4, tokens=5000,
        batch_size=100, quiet=True,
    )  # fmt: skip
    assert run.provenance.hook_name == "1:blocks.1.hook_resid_post"
    assert sb.evaluate(run=run, rows="all", quiet=True).explained_variance < 1
    with pytest.raises(UserError, match="has activations of several models"):
        sb.evaluate(run=run, rows="all", model="cache", quiet=True)
    with sb.index(run=run, cache=cache, out=out / "store", quiet=True) as store:
        assert store.info()["model"] == settings["model"][1]
        assert store.has("logit") and store.info()["text"] == settings["text"]
        assert store.examples(0)["tokens"].map(len).sum() > 0


def test_crosscoder_of_two_models_is_trained_evaluated_and_indexed(settings: dict[str, Any]) -> None:
    out = settings["out"].parent
    cache = sb.harvest(**{**settings, "tokens": 3000, "hook": ("blocks.1.hook_resid_post",)})
    run = sb.train(
        cache=cache, site=tuple(cache.hooks), crosscoder=True, out=out / "run", d_sae=32, k=4, tokens=3000,
        batch_size=100, quiet=True,
    )  # fmt: skip
    sae = sb.load(run)
    assert sae.d_in == 48 and [site.name for site in sae.spec.sites] == cache.hooks
    assert run.provenance.model is None
    assert sb.evaluate(run=run, rows="all", quiet=True).explained_variance < 1
    with sb.index(run=run, cache=cache, out=out / "store", quiet=True) as store:
        assert store.examples(0)["tokens"].map(len).sum() > 0
        assert store.info()["model"] == " and ".join(settings["model"])


def test_models_that_do_not_read_the_same_tokens_are_refused(
    settings: dict[str, Any], tiny_model_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="reads at most 48 tokens"):
        sb.harvest(**{**settings, "ctx": 50})
    with pytest.raises(UserError, match=r"have different tokenizers \(the first difference is token"):
        sb.harvest(**{**settings, "model": (str(tiny_model_folder), "demo")})
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "merges"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="they cut the first document into other tokens"):
        sb.harvest(**{**settings, "model": (str(tiny_model_folder), str(folder))})
    assert not settings["out"].exists()
