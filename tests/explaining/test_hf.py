"""The provider hf: P(yes) equals the softmax of the model's logits; prompts that are too long are refused."""

from __future__ import annotations

import shutil

import pytest
import torch

import saebench as sb
from saebench.core.errors import UserError
from saebench.explaining.hf import HuggingFace
from saebench.explaining.provider import Question
from saebench.store import check_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_text):
    """GPT-2 with random weights that reads 4,096 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.conftest import TINY_VOCABULARY, save_tiny_tokenizer

    folder = tmp_path_factory.mktemp("models") / "long"
    save_tiny_tokenizer(folder, tiny_text)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=TINY_VOCABULARY,
        n_positions=4096,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_probability_equals_softmax_of_two_answers(folder):
    asked = HuggingFace(str(folder), "cpu")
    questions = [Question("Say.", f"Is it {'so ' * n}?", True, 4) for n in (1, 30, 3, 9, 2, 5, 7, 4, 6, 8)]
    replies = asked.ask(questions)
    for question, reply in zip(questions, replies, strict=True):
        totals = []
        for word in (" Yes", " No"):
            prompt = asked._tokenizer.encode(f"{question.system}\n\n{question.user}\nAnswer:")
            answer = asked._tokenizer.encode(word)
            logprobs = asked._lm(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            totals.append(sum(logprobs[len(prompt) + i - 1, token] for i, token in enumerate(answer)))
        expected = torch.softmax(torch.stack(totals), 0)[0].item()
        assert reply.probability == pytest.approx(expected, abs=1e-4)
        assert reply.text == ("Yes" if reply.probability >= 0.5 else "No")


def test_too_long_prompt_fails_with_reason(folder):
    asked = HuggingFace(str(folder), "cpu")
    long, short = asked.ask([Question("", "so " * 5000, False, 4), Question("", "so", False, 4)])
    assert (long.status, short.status) == ("failed", "ok")
    assert "lower --examples or --window" in long.reason


def test_explain_with_local_model_stores_explanations(own_store, folder):
    settings = {"provider": "hf", "model": str(folder), "features": (3, 22), "examples": 3, "device": "cpu"}
    with sb.explain(own_store, **settings, window=8, quiet=True) as store:
        [explained] = store.explanations(3).to_dict("records")
        assert (explained["provider"], explained["model"]) == ("hf", "long")
        assert explained["status"] in ("ok", "unparsed")
        if explained["status"] == "ok":
            assert store.explanation_scores(3)["auc"].between(0, 1).all()
        assert store.explanations(22)["status"].tolist() == ["few"]
    assert check_store(own_store) == []


def test_model_that_is_not_a_local_folder_is_refused(own_store, tmp_path):
    with pytest.raises(UserError, match="is not a local folder"):
        sb.explain(own_store, provider="hf", model="some/model", quiet=True)


@pytest.mark.parametrize("damage", ["cut", "gap"])
def test_damaged_model_weights_are_refused(own_store, folder, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = broken / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        tensors = load_file(weights)
        del tensors["transformer.wpe.weight"]
        save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"cannot be asked|lack 1 tensors"):
        sb.explain(own_store, provider="hf", model=str(broken), quiet=True)
    assert check_store(own_store) == []
