"""The embedded language model: a Hugging Face folder whose held-out loss is below a bigram model's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import saebench_data
from saebench_data.scripts.measure_demo_model import N_CTX, count_bigram, load, model_losses
from saebench_data.scripts.packing import encode_documents, pack, read_addresses

FOLDER = saebench_data.path("demo_model")


def test_folder_is_small_and_standard() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 24 * 2**20
    config = json.loads((FOLDER / "config.json").read_text())
    assert (config["n_layer"], config["n_embd"], config["vocab_size"]) == (4, 256, 8192)
    header = (FOLDER / "model.safetensors").read_bytes()[8:20000].split(b"}}")[0]
    assert b'"BF16"' in header
    assert b'"F32"' not in header


def test_held_out_loss_is_below_a_bigram() -> None:
    """Measured on the first contexts of some held-out addresses; the bigram counts all other addresses.

    README.md has the losses on all held-out text; measure_demo_model.py recomputes them.
    """
    model, untrained, tokenizer = load(FOLDER)
    documents = read_addresses()
    bigram = count_bigram(tokenizer, [document for document in documents if not document.held_out])
    held_out = [document.text for document in documents if document.held_out][::4]
    contexts_CT = np.concatenate(
        [pack([tokens], N_CTX)[:3] for tokens in encode_documents(tokenizer, held_out)]
    )
    bigram_loss = bigram.losses(contexts_CT).mean()
    assert model_losses(model, contexts_CT).mean() < bigram_loss - 0.3
    assert bigram_loss < bigram.unigram_losses(contexts_CT).mean() - 0.3
    assert abs(model_losses(untrained, contexts_CT[:2]).mean() - np.log(8192)) < 0.2


def test_tokenizer_round_trips_every_string() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    assert len(tokenizer) == 8192
    assert (
        tokenizer.convert_tokens_to_ids("<|endoftext|>") == tokenizer.eos_token_id == tokenizer.bos_token_id
    )
    for text in ("The state of the Union", "naïve — ½ 🙂\n\ttabs  and spaces ", "1790-1980"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert tokenizer.tokenize(" Congress") == ["ĠCongress"]


def test_transformer_lens_loads_it_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformer_lens.model_bridge import TransformerBridge

    model, _, tokenizer = load(FOLDER)
    bridge = TransformerBridge.boot_transformers(str(FOLDER), device="cpu", dtype=torch.float32)
    tokens = torch.from_numpy(pack(encode_documents(tokenizer, [read_addresses()[0].text]), 64)[:2]).long()
    with torch.no_grad():
        torch.testing.assert_close(bridge(tokens), model(tokens).logits, atol=1e-3, rtol=1e-3)
