"""Tokens that were added to a tokenizer: beyond the embedding, and written with U+2581."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import saebench as sb
from saebench.assets import resolve_model
from saebench.core.errors import UserError
from saebench.sources.model_info import peek_model
from saebench.sources.tokenizer import open_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(resolve_model("demo"), tmp_path / "model"))


def add(folder: Path, tokens: list[Any], **special: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(tokens)
    if special:
        tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(folder)


def test_a_token_beyond_the_embedding_hinders_only_texts_that_spell_it_out(
    folder: Path, tmp_path: Path
) -> None:
    from transformers import AddedToken

    add(folder, [AddedToken("<image_soft_token>", special=True)])
    info = peek_model(str(folder))
    tokens = open_tokenizer(info)
    plain = open_tokenizer(peek_model("demo"))
    text = "The Congress of the United States"
    assert tokens.encode(text) == plain.encode(text)
    assert tokens.bytes() == plain.bytes() and len(tokens.bytes()) == info.vocab_size
    assert tokens.ids_of(["special"]) != []
    with pytest.raises(UserError, match=r"holds '<image_soft_token>', token 8192, .* has no embedding"):
        tokens.encode("see <image_soft_token> here")
    (tmp_path / "text.txt").write_text("It says <image_soft_token> here. " * 20)
    with pytest.raises(UserError, match="remove it from the text"):
        sb.harvest(
            model=str(folder), text=str(tmp_path / "text.txt"), out=tmp_path / "c", tokens=50, quiet=True
        )


def test_a_token_beyond_the_embedding_that_ends_every_text_is_refused(folder: Path) -> None:
    add(folder, [], eos_token="<|new_end|>")
    with pytest.raises(UserError, match="between texts, but the model's vocabulary ends at"):
        open_tokenizer(peek_model(str(folder)))


def test_a_vocabulary_larger_than_the_embedding_is_refused(folder: Path) -> None:
    import json

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] - 5}))
    with pytest.raises(UserError, match="vocabulary ends at"):
        open_tokenizer(peek_model(str(folder)))


@pytest.mark.parametrize("prepend", [False, True])
def test_runs_of_spaces_among_added_tokens_are_shown_as_spaces(folder: Path, prepend: bool) -> None:
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in ("\u2581", *"abc", "\u2581\u2581", "\u2581\u2581\u2581", "[\u2581]"):
        vocab[piece] = len(vocab)
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    if prepend:  # Llama: the first space of a text is taken away again
        made.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    made.add_tokens([AddedToken(run, special=False) for run in ("\u2581\u2581", "\u2581\u2581\u2581")])
    made.add_tokens([AddedToken("[\u2581]", special=True)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    shown = open_tokenizer(peek_model(str(folder))).bytes()
    assert [shown[vocab["\u2581" * n]] for n in (1, 2, 3)] == [b" ", b"  ", b"   "]
    assert shown[vocab["[\u2581]"]] == "[\u2581]".encode()  # a special token stands for its name
