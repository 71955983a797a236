"""``evaluate`` with a random two-layer GPT-2 and SAEs whose effect on the model is known exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saebench.activations.cache import ActivationCache
from saebench.activations.harvest import harvest
from saebench.core.errors import UserError
from saebench.evaluation import EvalReport, evaluate
from saebench.evaluation.samples import cache_contexts, choose_rows
from saebench.saes.topk import TopKSAE, TopKSpec
from saebench.sources.models import load_model

D_IN, HOOK = 32, "blocks.0.hook_resid_post"
NUMBERS = ("fvu", "cosine_similarity", "ce_clean", "ce_spliced", "ce_zero", "ce_mean", "kl")


@pytest.fixture(scope="module")
def cache(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_text: Path
) -> ActivationCache:
    """All of the tiny text in fp32, so that cached activations equal those of the model."""
    return harvest(
        out=tmp_path_factory.mktemp("cache") / "cache",
        model=str(tiny_model_folder),
        text=str(tiny_text),
        hook=HOOK,
        tokens=100_000,
        ctx=24,
        dtype="fp32",
        shard_rows=32_768,
        device="cpu",
        quiet=True,
    )


def save_run(path: Path, cache: ActivationCache, weight: Tensor, b_dec: Tensor, **facts: Any) -> Path:
    """An SAE with the output sum of relu(+-x) +-weight + b_dec, that is x * weight + b_dec."""
    sae = TopKSAE(TopKSpec(d_sae=2 * D_IN, k=2 * D_IN), D_IN)
    signs = torch.cat([torch.eye(D_IN), -torch.eye(D_IN)])
    # The encoder sees x - b_dec; b_enc undoes that.
    state = {"W_enc_MD": signs, "W_dec": signs * weight, "b_enc": signs @ b_dec, "b_dec": b_dec}
    sae.load_state_dict(state, strict=False)
    sae.save(path, hook_name=HOOK, model=cache.model, **facts)
    run = {"format_version": 1, "train": {"cache": str(cache.path)}}
    (path / "run.json").write_text(json.dumps(run))
    return path


def run_evaluate(run: Path, **settings: Any) -> EvalReport:
    return evaluate(run=run, device="cpu", quiet=True, **settings)


def test_perfect_sae_keeps_ce_equal_to_transformers(tmp_path: Path, cache: ActivationCache) -> None:
    run = save_run(tmp_path / "run", cache, torch.ones(D_IN), torch.zeros(D_IN))
    report = run_evaluate(run, model="cache", batch_size=3)
    assert report.fvu == 0
    assert report.ce_spliced == pytest.approx(report.ce_clean, abs=1e-5)
    assert report.kl == pytest.approx(0, abs=1e-6)
    assert report.ce_delta == pytest.approx(0, abs=1e-5)
    if report.ce_loss_score is not None:
        assert report.ce_loss_score == pytest.approx(1, abs=1e-2)

    from transformers import AutoModelForCausalLM

    assert cache.model is not None
    peer = AutoModelForCausalLM.from_pretrained(cache.model["name"])
    losses = []
    held_out = cache.ctx[cache.held_out].unique().tolist()
    for c in held_out:
        tokens = cache.context_tokens[c, : cache.context_len[c]].long()
        with torch.no_grad():
            log_p = peer(tokens[None]).logits[0].double().log_softmax(-1)
        losses += [-log_p[t, tokens[t + 1]].item() for t in range(1, len(tokens) - 1)]
    assert report.n_tokens == int(cache.held_out.sum())
    assert report.n_tokens_model == len(losses) == report.n_tokens - len(held_out)
    assert report.ce_clean == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_saes_that_output_mean_or_zero_equal_their_ablations(tmp_path: Path, cache: ActivationCache) -> None:
    mean = cache.activations()[~cache.held_out].double().mean(0).float()
    report = run_evaluate(save_run(tmp_path / "mean", cache, torch.zeros(D_IN), mean), model="cache")
    assert report.ce_spliced == pytest.approx(report.ce_mean, abs=1e-6)
    assert report.ce_mean != pytest.approx(report.ce_zero, abs=1e-6)
    report = run_evaluate(
        save_run(tmp_path / "zero", cache, torch.zeros(D_IN), torch.zeros(D_IN)), model="cache"
    )
    assert report.ce_spliced == report.ce_zero
    assert report.ce_loss_score in (0, None)


def test_replaced_positions_are_rows_of_cache(cache: ActivationCache) -> None:
    row_N = choose_rows(cache, rows="held-out", tokens=70)
    contexts = cache_contexts(cache, row_N)
    assert cache.model is not None
    seen: list[Tensor] = []

    def record(x_BTD: Tensor) -> Tensor:
        seen.append(x_BTD)
        return x_BTD

    load_model(cache.model["name"]).logits(contexts.tokens_BT, edit={HOOK: record})
    torch.testing.assert_close(seen[0][contexts.keep_BT], cache.activations()[row_N])
    assert not contexts.keep_BT[:, 0].any()


@pytest.mark.parametrize("tokens", [100_000, 77, 46])  # everything; half of a context; two whole ones
def test_text_of_cache_gives_same_numbers_as_cache(
    tmp_path: Path, cache: ActivationCache, tiny_text: Path, tokens: int
) -> None:
    run = save_run(tmp_path / "run", cache, torch.linspace(0.5, 1, D_IN), torch.full((D_IN,), 0.01))
    from_cache = run_evaluate(run, model="cache", tokens=tokens)
    from_text = run_evaluate(run, model="cache", text=str(tiny_text), tokens=tokens)
    assert (from_text.text, from_text.cache_hash) == (str(tiny_text), None)
    assert from_text.n_tokens == from_cache.n_tokens == min(tokens, int(cache.held_out.sum()))
    assert from_text.n_tokens_model == from_cache.n_tokens_model
    for name in NUMBERS:
        assert getattr(from_text, name) == pytest.approx(getattr(from_cache, name), abs=1e-5), name
    assert json.loads((run / "eval.json").read_bytes())["kl"] == from_text.kl


def test_evaluation_on_text_works_without_cache(
    tmp_path: Path, cache: ActivationCache, tiny_text: Path
) -> None:
    run = save_run(tmp_path / "run", cache, torch.zeros(D_IN), torch.zeros(D_IN))
    training = {"format_version": 1, "train": {"cache": str(tmp_path / "deleted")}}
    (run / "run.json").write_text(json.dumps({**training, "contexts": {"ctx": 32, "bos": False}}))
    report = run_evaluate(run, model="cache", text=str(tiny_text), rows="all", tokens=500)
    assert (report.n_tokens, report.rows) == (500, "all")
    assert report.n_tokens_model is not None
    assert report.n_tokens_model > 480
    with pytest.raises(UserError, match="deleted"):
        run_evaluate(run)
    (run / "run.json").write_text(json.dumps(training))
    with pytest.raises(UserError, match=r"did not record whether contexts begin with BOS"):
        run_evaluate(run, model="cache", text=str(tiny_text), rows="all", tokens=500)


def test_mismatched_model_text_or_hook_is_refused_with_one_sentence(
    tmp_path: Path, cache: ActivationCache, tiny_model_folder: Path, tiny_text: Path
) -> None:
    run = save_run(tmp_path / "run", cache, torch.zeros(D_IN), torch.zeros(D_IN))
    other = tmp_path / "other"
    shutil.copytree(tiny_model_folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 1e-3}))
    alone = tmp_path / "alone.jsonl"
    alone.write_text(json.dumps({"text": "not held out"}) + "\n")

    with pytest.raises(UserError, match="is not the one that made the cache"):
        run_evaluate(run, model=str(other))
    run_evaluate(run, model=str(other), text=str(tiny_text), tokens=50)
    with pytest.raises(UserError, match=r"no document of --text .* is held out .* --rows all"):
        run_evaluate(run, model="cache", text=str(alone))
    with pytest.raises(UserError, match="did you mean"):
        run_evaluate(run, model="cache", hook="blocks.0.hook_resid_pots", text=str(tiny_text))
    with pytest.raises(
        UserError, match=r"the SAE reads 32 dimensions but blocks\.0\.mlp\.hook_post .* has 128"
    ):
        run_evaluate(run, model="cache", hook="blocks.0.mlp.hook_post", text=str(tiny_text))
