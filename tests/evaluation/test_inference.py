"""``evaluate`` with ``inference``: each inference mode is measured and has its own report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saebench.activations.cache import ActivationCache
from saebench.activations.harvest import harvest
from saebench.cli import main
from saebench.core.errors import UserError
from saebench.evaluation import EvalReport, evaluate, reconstruction_metrics
from saebench.evaluation.samples import cache_contexts, choose_rows
from saebench.runs.run import load
from saebench.saes.base import Batch
from saebench.saes.gradient import GradientSAE, GradientSpec
from saebench.saes.topk import TopKSAE, TopKSpec
from saebench.sources.models import load_model

D_IN, HOOK = 32, "blocks.0.hook_resid_post"
TOKENS = 170


@pytest.fixture(scope="module")
def cache(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_text: Path
) -> ActivationCache:
    """All of the tiny text with gradients, in fp32."""
    return harvest(
        out=tmp_path_factory.mktemp("cache") / "cache",
        model=str(tiny_model_folder),
        text=str(tiny_text),
        hook=HOOK,
        gradients=True,
        tokens=100_000,
        ctx=24,
        dtype="fp32",
        shard_rows=32_768,
        device="cpu",
        quiet=True,
    )


@pytest.fixture
def run(tmp_path: Path, cache: ActivationCache) -> Path:
    """An untrained gradient SAE, whose picks differ widely from TopK's."""
    sae = GradientSAE(GradientSpec(d_sae=64, k=6, beta=10), D_IN)
    sae.initialize(Batch(cache.activations()[:2000], cache.gradients()[:2000]), seed=0)
    return save(sae, tmp_path / "run", cache)


def save(sae: Any, path: Path, cache: ActivationCache) -> Path:
    sae.save(path, hook_name=HOOK, model=cache.model)
    (path / "run.json").write_text(json.dumps({"format_version": 1, "train": {"cache": str(cache.path)}}))
    return path


def run_evaluate(run: Path, **settings: Any) -> EvalReport:
    return evaluate(run=run, device="cpu", quiet=True, **{"tokens": TOKENS, **settings})


def test_each_inference_mode_writes_its_own_report(run: Path) -> None:
    plain = run_evaluate(run)
    assert (plain.inference, plain.picks_changed) == ("plain", None)
    before = (run / "eval.json").read_bytes()
    reports = {"plain": plain} | {way: run_evaluate(run, inference=way) for way in ("proxy", "oracle")}
    assert (run / "eval.json").read_bytes() == before
    assert sorted(path.name for path in run.glob("eval*")) == [
        "eval-oracle.json", "eval-proxy.json", "eval.json",
    ]  # fmt: skip
    for way in ("proxy", "oracle"):
        written = json.loads((run / f"eval-{way}.json").read_bytes())
        assert (written["inference"], written["picks_changed"]) == (way, reports[way].picks_changed)
        assert 0 < reports[way].picks_changed < 1 and reports[way].fvu != plain.fvu
        assert reports[way].n_tokens == TOKENS
    assert run_evaluate(run, inference="plain") == plain


def test_oracle_on_cached_rows_reads_gradients_of_cache(run: Path, cache: ActivationCache) -> None:
    sae, row_N = load(run), choose_rows(cache, rows="held-out", tokens=TOKENS)
    x_ND, g_ND = cache.activations()[row_N], cache.gradients()[row_N]
    report = run_evaluate(run, inference="oracle")
    z_NM = ((x_ND - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    score_NM = z_NM * (1 + 10 * sae.gradient_scale * (g_ND @ sae.W_dec.T).abs())
    chosen = torch.zeros_like(z_NM, dtype=torch.bool).scatter(1, score_NM.topk(6).indices, True)
    plain = torch.zeros_like(chosen).scatter(1, z_NM.topk(6).indices, True)
    x_hat_ND = (z_NM * chosen) @ sae.W_dec + sae.b_dec
    fvu = (x_ND - x_hat_ND).square().sum() / (x_ND - x_ND.mean(0)).square().sum()
    assert report.fvu == pytest.approx(fvu.item(), rel=1e-4)
    assert report.l0 == pytest.approx(((z_NM > 0) & chosen).sum().item() / TOKENS)
    assert report.picks_changed == pytest.approx((chosen & ~plain).sum().item() / chosen.sum().item())
    assert reconstruction_metrics(sae, [x_ND]).fvu != pytest.approx(report.fvu)


def test_oracle_spliced_into_model_reads_gradients_of_model(run: Path, cache: ActivationCache) -> None:
    sae = load(run)
    contexts = cache_contexts(cache, choose_rows(cache, rows="held-out", tokens=TOKENS))
    model, tokens_BT = load_model(cache.model["name"]), contexts.tokens_BT
    found, at = model.gradients(tokens_BT, contexts.length_B, [HOOK])
    codes = sae.encode(found[HOOK], inference="oracle", gradient=at[HOOK])
    kept_BT1 = contexts.keep_BT[..., None]
    new_BTD = torch.where(kept_BT1, sae.decode(codes), found[HOOK])
    log_p_BTV = model.logits(tokens_BT, edit={HOOK: lambda _: new_BTD}).double().log_softmax(-1)
    b, t, target = contexts.scored()
    report = run_evaluate(run, inference="oracle", model="cache", batch_size=3)
    assert report.n_tokens_model == len(b) == TOKENS  # in a cache with gradients, every row has a next token
    assert report.ce_spliced == pytest.approx(-log_p_BTV[b, t, target].mean().item(), abs=1e-5)
    others = [run_evaluate(run, inference=way, model="cache") for way in ("plain", "proxy")]
    assert all(other.ce_clean == pytest.approx(report.ce_clean, abs=1e-6) for other in others)
    assert len({other.ce_spliced for other in (report, *others)}) == 3


@pytest.mark.parametrize("inference", ["plain", "proxy", "oracle"])
def test_text_of_cache_gives_same_numbers_as_cache(run: Path, tiny_text: Path, inference: str) -> None:
    settings = {"inference": inference, "model": "cache"}
    from_cache, from_text = run_evaluate(run, **settings), run_evaluate(run, text=str(tiny_text), **settings)
    for name in ("n_tokens", "n_tokens_model", "fvu", "ce_clean", "ce_spliced", "kl", "picks_changed"):
        expected = getattr(from_cache, name)
        found = getattr(from_text, name)
        assert found == (expected if expected is None else pytest.approx(expected, abs=1e-5)), name


def test_oracle_on_text_measures_only_positions_with_next_token(
    run: Path, tiny_model_folder: Path, tiny_text: Path
) -> None:
    (run / "run.json").unlink()  # without it, the packing of contexts is not recorded
    settings = {"model": str(tiny_model_folder), "text": str(tiny_text)}
    measured = [run_evaluate(run, inference=way, **settings) for way in ("oracle", "plain")]
    assert [report.n_tokens for report in measured] == [TOKENS, TOKENS]
    assert measured[0].n_tokens_model == TOKENS > measured[1].n_tokens_model


def test_unsupported_inference_mode_is_refused_with_one_sentence(
    run: Path, tmp_path: Path, cache: ActivationCache, make_cache: Callable[..., ActivationCache]
) -> None:
    topk = TopKSAE(TopKSpec(d_sae=64, k=6), D_IN)
    topk.initialize(Batch(cache.activations()[:500]), seed=0)
    other = save(topk, tmp_path / "topk", cache)
    assert run_evaluate(other).inference is None
    with pytest.raises(UserError, match="a topk SAE has only one inference mode; leave --inference"):
        run_evaluate(other, inference="plain")
    with pytest.raises(
        UserError, match=r"--inference best is not an inference mode .* one of plain, proxy, oracle"
    ):
        run_evaluate(run, inference="best")
    bare = make_cache(tmp_path / "bare", cache.activations(), hook=HOOK)
    with pytest.raises(UserError, match=f"the cache {bare.path} has no gradients at {HOOK}"):
        run_evaluate(run, inference="oracle", cache=bare.path)
    assert not list(run.glob("eval*")) and [path.name for path in other.glob("eval*")] == ["eval.json"]


def test_table_marks_oracle_as_seeing_next_tokens(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--inference", "oracle", "--tokens", "100", "--quiet"]) == 0
    assert "oracle (sees the next tokens)" in capsys.readouterr().out
