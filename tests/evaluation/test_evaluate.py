"""``evaluate`` without a model, on caches and runs on disk."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saebench.activations.cache import ActivationCache
from saebench.core.errors import UserError
from saebench.evaluation import evaluate, reconstruction_metrics
from saebench.evaluation.settings import EvalConfig
from saebench.saes.base import SAE, Batch
from saebench.saes.topk import TopKSAE, TopKSpec

MakeCache = Callable[..., ActivationCache]
D_IN, HOOK = 6, "imported"


def save_run(path: Path, *, cache: Path | None = None, hook: str | None = HOOK, d_in: int = D_IN) -> SAE:
    """A run directory with an SAE of random weights."""
    sae = TopKSAE(TopKSpec(d_sae=24, k=3), d_in)
    sae.initialize(Batch(torch.randn(100, d_in, generator=torch.Generator().manual_seed(1))), seed=0)
    sae.save(path, **({} if hook is None else {"hook_name": hook}))
    if cache is not None:
        run = {"format_version": 1, "train": {"cache": str(cache)}, "hook_name": hook}
        (path / "run.json").write_text(json.dumps(run))
    return sae


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(1000, D_IN, generator=torch.Generator().manual_seed(0))


def test_default_measures_held_out_rows_of_training_cache(
    tmp_path: Path, make_cache: MakeCache, x: torch.Tensor
) -> None:
    cache = make_cache(tmp_path / "cache", x)
    sae = save_run(tmp_path / "run", cache=tmp_path / "cache")
    report = evaluate(EvalConfig(run=tmp_path / "run", quiet=True, device="cpu"))

    assert report.to_dict() == json.loads((tmp_path / "run" / "eval.json").read_bytes(), object_hook=_tuples)
    expected = reconstruction_metrics(sae, [x[cache.held_out]])
    assert (report.n_tokens, report.rows, report.cache_hash) == (50, "held-out", cache.hash)
    assert (report.sae, report.d_sae, report.k, report.hook_name) == ("topk", 24, 3, HOOK)
    for name in ("fvu", "explained_variance", "l0", "dead_fraction", "cosine_similarity"):
        assert getattr(report, name) == pytest.approx(getattr(expected, name))
    assert sum(report.density_histogram.counts) + report.density_histogram.dead == 24
    without_model = ("ce_clean", "ce_spliced", "ce_zero", "ce_mean", "ce_loss_score", "kl", "model")
    assert all(getattr(report, name) is None for name in without_model)


def _tuples(value: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}


def test_rows_and_tokens_select_measured_rows(tmp_path: Path, make_cache: MakeCache, x: torch.Tensor) -> None:
    make_cache(tmp_path / "cache", x)
    sae = save_run(tmp_path / "run", cache=tmp_path / "cache")
    report = evaluate(run=tmp_path / "run", rows="all", tokens=300, quiet=True, device="cpu")
    assert (report.n_tokens, report.rows) == (300, "all")
    assert report.fvu == pytest.approx(reconstruction_metrics(sae, [x[:300]]).fvu)
    again = evaluate(run=tmp_path / "run", rows="all", tokens=300, quiet=True, device="cpu")
    assert again == report


def test_sae_without_run_needs_named_cache(tmp_path: Path, make_cache: MakeCache, x: torch.Tensor) -> None:
    make_cache(tmp_path / "cache", x)
    save_run(tmp_path / "sae", hook=None)
    with pytest.raises(UserError, match=r"does not say which cache .* --cache"):
        evaluate(run=tmp_path / "sae", quiet=True)
    report = evaluate(run=tmp_path / "sae", cache=tmp_path / "cache", quiet=True, device="cpu")
    assert report.n_tokens == 50


def test_missing_training_cache_is_refused_with_its_path(
    tmp_path: Path, make_cache: MakeCache, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(tmp_path / "cache", x)
    save_run(tmp_path / "run", cache=Path("cache"))
    monkeypatch.chdir(tmp_path)
    assert evaluate(run="run", quiet=True, device="cpu").cache_hash == cache.hash
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"run was trained on the cache cache, .* name it with --cache"):
        evaluate(run="../run", quiet=True, device="cpu")


def test_mismatched_input_is_refused_and_keeps_last_report(
    tmp_path: Path, make_cache: MakeCache, x: torch.Tensor
) -> None:
    good, run = tmp_path / "cache", tmp_path / "run"
    make_cache(good, x)
    make_cache(tmp_path / "wide", torch.randn(100, D_IN + 1))
    save_run(run, cache=good)
    evaluate(run=run, quiet=True)
    before = (run / "eval.json").read_bytes()

    def refused(match: str, **settings: Any) -> None:
        with pytest.raises(UserError, match=match):
            evaluate(run=run, quiet=True, **settings)
        assert (run / "eval.json").read_bytes() == before

    refused("reads 6 dimensions but imported of .*wide has 7", cache=tmp_path / "wide")
    refused("no hook 'importd'; did you mean imported", hook="importd")
    refused("activation cache .*nowhere", cache=tmp_path / "nowhere")
    refused("was imported without tokens", model="cache")
    shard = good / "hook" / HOOK / "00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-4:] = struct.pack("<f", float("nan"))
    shard.write_bytes(data)
    refused(r"00000\.safetensors is damaged: its SHA-256")
    with pytest.raises(UserError, match="holds no SAE"):
        evaluate(run=tmp_path / "nowhere", quiet=True)


def test_damaged_run_description_is_refused(tmp_path: Path) -> None:
    save_run(tmp_path / "run", cache=tmp_path / "cache")
    for train in ({"cache": 5}, []):
        (tmp_path / "run" / "run.json").write_text(json.dumps({"format_version": 1, "train": train}))
        with pytest.raises(UserError, match="damaged: train"):
            evaluate(run=tmp_path / "run", quiet=True)
