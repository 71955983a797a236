"""Harvests of token ids, chats and texts with null rows, also by a model without a tokenizer."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import saebench as sb
from saebench.core.errors import UserError
from saebench.sources.text import Document, read_documents

HOOK = "blocks.1.hook_resid_post"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
CHATS = [
    [{"role": "user", "content": f"Question {i}?"}, {"role": "bot", "content": "Yes. " * (i % 7)}]
    for i in range(80)
]


@pytest.fixture
def settings(tiny_model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_model_folder),
        "text": str(tmp_path / "text.jsonl"),
        "site": HOOK,
        "tokens": 10**6,
        "ctx": 32,
        "dtype": "fp32",
        "shard_rows": 32_768,
        "out": tmp_path / "cache",
        "quiet": True,
    }


def write(path: str | Path, column: str, values: list[Any]) -> None:
    Path(path).write_text("".join(json.dumps({column: value}) + "\n" for value in values))


def spelled(cache: sb.ActivationCache, held_out: bool) -> list[int]:
    """The tokens of all contexts of one stream, in order."""
    streams = torch.zeros(cache.n_contexts, dtype=torch.bool)
    streams[cache.ctx.long()] = cache.held_out
    used = [
        tokens[:length].tolist()
        for tokens, length, is_held_out in zip(cache.context_tokens, cache.context_len, streams, strict=True)
        if is_held_out == held_out
    ]
    return list(itertools.chain(*used))


def test_token_ids_are_used_as_they_are_and_followed_by_the_separator(settings: dict[str, Any]) -> None:
    ids = [[(i * j + 3) % 399 + 1 for j in range(i % 40 + 1)] for i in range(90)]
    ids[4].append(0)  # the separator already
    write(settings["text"], "ids", ids)
    cache = sb.harvest(**settings, column="ids")
    for held_out in (False, True):
        chosen = [list(one) for one in ids if Document("", tokens=tuple(one)).held_out == held_out]
        expected = itertools.chain(*(one if one[-1] == 0 else [*one, 0] for one in chosen))
        assert spelled(cache, held_out) == list(expected)
    model = sb.load_model(settings["model"])
    found = model.run_to(cache.context_tokens, [HOOK])[HOOK]
    torch.testing.assert_close(cache.activations(), found[cache.ctx.long(), cache.pos.long()])


def test_model_without_tokenizer_reads_token_ids_but_no_text(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(settings["model"], tmp_path / "bare"))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    write(settings["text"], "ids", [[i % 400, 5, 9] * 12 for i in range(60)])
    whole = sb.harvest(**settings, column="ids")
    bare = sb.harvest(**{**settings, "model": str(folder), "out": tmp_path / "of-bare"}, column="ids")
    assert torch.equal(bare.activations(), whole.activations())
    assert bare.vocab() == [b"<%d>" % i for i in range(400)]
    run = sb.train(cache=bare, out=tmp_path / "run", d_sae=64, k=4, tokens=600, batch_size=200, quiet=True)
    assert sb.evaluate(run, model="cache", quiet=True).kl is not None
    with sb.index(run=run.path, cache=bare, out=tmp_path / "store", quiet=True) as store:
        assert "<5>" in str(store.features().top_token.tolist())
    for call in (
        lambda: sb.features_of("a text", run),
        lambda: sb.harvest(**{**settings, "model": str(folder), "text": "sotu", "out": tmp_path / "no"}),
    ):
        with pytest.raises(UserError, match=r"has no tokenizer in .*or give a text of token ids"):
            call()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "bos_token_id": None}))
    with pytest.raises(UserError, match="has no BOS token"):
        sb.harvest(**{**settings, "model": str(folder), "out": tmp_path / "no"}, column="ids", bos="always")


def test_token_ids_outside_the_vocabulary_raise_before_the_model_is_loaded(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saebench.activations.text_source.load_model", lambda *_, **__: pytest.fail("loaded"))
    write(settings["text"], "ids", [[1, 400]])
    with pytest.raises(UserError, match=r"token id 400, but the vocabulary of .* ends at 399"):
        sb.harvest(**settings, column="ids")


def test_chats_are_rendered_with_the_template_of_the_model(settings: dict[str, Any], tmp_path: Path) -> None:
    write(settings["text"], "chat", [None, *CHATS])
    with pytest.raises(UserError, match="has no chat template"):
        sb.harvest(**settings, column="chat")
    folder = Path(shutil.copytree(settings["model"], tmp_path / "chatty"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    cache = sb.harvest(**{**settings, "model": str(folder)}, column="chat")
    vocab = cache.vocab()
    for held_out in (False, True):
        text = b"".join(vocab[i] for i in spelled(cache, held_out)).decode()
        chosen = [
            d.messages for d in read_documents(settings["text"], column="chat") if d.held_out == held_out
        ]
        rendered = ["".join(f"<{m['role']}>{m['content']}\n" for m in chat) for chat in chosen]
        assert text == "".join(one + "<|endoftext|>" for one in rendered)
        assert chosen
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match=r"refuses a chat of --text .roles must alternate"):
        sb.harvest(**{**settings, "model": str(folder), "out": tmp_path / "no"}, column="chat")


def test_null_rows_before_the_last_document_are_counted(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [None if i % 5 == 0 else f"Text {i}. " * 9 for i in range(200)]
    write(settings["text"], "text", texts)
    cache = sb.harvest(**{**settings, "tokens": 300})
    used = [text for text in texts if text is not None][: int(cache.doc.max()) + 1]
    expected = sum(text is None for text in texts[: texts.index(used[-1])])
    assert cache.manifest["left_out"] == {"null_rows": expected} and expected > 1
    assert f"warning: {expected} null rows were left out" in capsys.readouterr().err
    again = sb.harvest(**{**settings, "tokens": 300, "out": tmp_path / "again"})
    assert again.hash == cache.hash


def test_rows_of_excluded_tokens_and_of_huge_norms_are_left_out(
    settings: dict[str, Any], tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings |= {"text": str(tiny_text), "batch_size": 4, "site": [HOOK, "blocks.0.mlp.hook_post"]}
    whole = sb.harvest(**{**settings, "out": tmp_path / "whole"})
    dot = next(i for i, piece in enumerate(whole.vocab()) if piece == b".")
    excluded = sb.harvest(
        **{**settings, "out": tmp_path / "excluded"}, exclude_tokens=["special", " the", dot]
    )
    the = next(i for i, piece in enumerate(whole.vocab()) if piece == b" the")
    assert excluded.manifest["made_from"]["settings"]["exclude_tokens"] == sorted([0, the, dot])
    keep_N = ~torch.isin(whole.tokens, torch.tensor([0, the, dot]))
    # A context without any row is left out, so that contexts may have other numbers.
    assert torch.equal(excluded.activations(), whole.activations()[keep_N])
    assert torch.equal(excluded.pos, whole.pos[keep_N])
    assert excluded.manifest["left_out"] == {"excluded_tokens": int((~keep_N).sum())}

    capsys.readouterr()
    limited = sb.harvest(**settings, max_norm=1.1)
    first = whole.ctx < 4
    keep_N = torch.ones(whole.n_rows, dtype=torch.bool)
    for hook in whole.hooks:
        norm_N = whole.activations(hook).norm(dim=1)
        limit = limited.manifest["max_norm"]["limit"][hook]
        assert limit == pytest.approx(1.1 * float(norm_N[first].median()), rel=1e-5)
        keep_N &= norm_N <= limit
    assert 0.5 < keep_N.float().mean() < 1
    for name in ("tokens", "doc", "ctx", "pos", "held_out"):
        assert torch.equal(getattr(limited, name), getattr(whole, name)[keep_N])
    assert torch.equal(limited.activations(), whole.activations()[keep_N])
    dropped = int((~keep_N).sum())
    assert limited.manifest["left_out"] == {"above_max_norm": dropped}
    assert f"{dropped:,} rows above --max-norm were left out" in capsys.readouterr().err
    assert torch.equal(limited.context_tokens, whole.context_tokens)


def test_evaluation_on_a_text_judges_the_positions_that_the_harvest_kept(
    settings: dict[str, Any], tiny_text: Path, tmp_path: Path
) -> None:
    settings |= {"text": str(tiny_text)}
    cache = sb.harvest(**settings, max_norm=1.1, exclude_tokens=["special"])
    run = sb.train(cache=cache, out=tmp_path / "run", d_sae=64, k=4, tokens=600, batch_size=200, quiet=True)
    common = {"model": "cache", "quiet": True, "tokens": 10**6}
    on_cache = sb.evaluate(run.path, **common)
    on_text = sb.evaluate(run.path, text=str(tiny_text), **common)
    assert on_text.n_tokens == on_cache.n_tokens == int(cache.held_out.sum())
    assert on_text.fvu == pytest.approx(on_cache.fvu, rel=1e-3)
    assert on_text.kl == pytest.approx(on_cache.kl, rel=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exclude_tokens": ["a longer text"]}, r"'a longer text' is \d+ tokens \("),
        ({"exclude_tokens": [400]}, "400 is not in the vocabulary of 400 tokens"),
        ({"exclude_tokens": ["400"]}, "'400' is not in the vocabulary"),
        ({"max_norm": 0.5}, "max_norm is 0.5"),
    ],
)
def test_invalid_choices_of_rows_raise_user_error(
    settings: dict[str, Any], tiny_text: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        sb.harvest(**{**settings, "text": str(tiny_text)}, **change)
    assert not settings["out"].exists()
