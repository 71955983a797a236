"""loss_effects against manual ablation and finite differences, and the columns in the store."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import saebench as sb
from saebench.activations.cache import ActivationCache
from saebench.analysis.contexts import draw_contexts
from saebench.analysis.effects import loss_effects
from saebench.cli import main
from saebench.core.errors import UserError
from saebench.core.files import directory_lock
from saebench.runs.run import load
from saebench.saes.base import SAE
from saebench.sources.models import Model
from saebench.store import check_store

SMALL = {"sample": 6, "quiet": True}


def losses(
    model: Model, ids_T: Tensor, edit: dict[str, Callable[[Tensor], Tensor]] | None = None
) -> tuple[Tensor, Tensor]:
    """log probabilities [T - 1, V], and the summed cross entropy of the next tokens."""
    logp_TV = model.logits(ids_T[None], edit=edit)[0, :-1].double().log_softmax(-1)
    return logp_TV, -logp_TV.gather(1, ids_T[1:, None]).sum()


def scaled(sae: SAE, feature: int, factor: float) -> Callable[[Tensor], Tensor]:
    """Multiply the contribution of one latent by ``factor`` at all positions except 0."""

    def edit(x_BTD: Tensor) -> Tensor:
        z_TM = sae.encode(x_BTD[0]).to_dense()
        error_TD = x_BTD[0] - (z_TM @ sae.W_dec + sae.b_dec)
        z_TM[1:, feature] *= factor
        return (z_TM @ sae.W_dec + sae.b_dec + error_TD)[None]

    return torch.no_grad()(edit)


@pytest.mark.parametrize("name", ["topk", "matching-pursuit"])
@pytest.mark.parametrize(
    "place", ["blocks.0.hook_resid_post", "blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out"]
)
def test_effects_equal_manual_ablation(
    make_sae: Callable[[str], SAE], tiny_model: Model, tiny_cache: ActivationCache, name: str, place: str
) -> None:
    sae = make_sae(name)
    found = loss_effects(sae, tiny_cache, tiny_model, place, contexts=1, **SMALL)
    drawn = {p.ctx: p for p in draw_contexts(tiny_cache, 6, rows="held-out", seed=0)}
    assert len(found.pairs) > 20
    for pair in found.pairs[::7].to_dict("records"):
        ids_T = drawn[pair["ctx"]].ids_T
        clean_TV, clean = losses(tiny_model, ids_T)
        edited_TV, edited = losses(tiny_model, ids_T, {place: scaled(sae, pair["feature"], 0.0)})
        assert pair["effect"] == pytest.approx(float(edited - clean), abs=2e-5, rel=1e-3)
        kl = float((clean_TV.exp() * (clean_TV - edited_TV)).sum())
        assert pair["kl"] == pytest.approx(kl, abs=2e-6, rel=1e-2)
        assert pair["n_tokens"] == len(ids_T) - 2
    assert found.pairs["kl"].max() > 1e-4
    assert found.pairs["effect"].abs().max() > 1e-2


@pytest.mark.parametrize("place", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"])
def test_model_runs_once_up_to_a_hook_between_blocks(tiny_model: Model, place: str) -> None:
    ids_1T = torch.arange(9)[None]
    x_FTD = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(0))
    expected = tiny_model.logits(ids_1T.expand(3, -1), edit={place: lambda _: x_FTD})
    batches: list[int] = []
    handle = tiny_model.module.register_forward_pre_hook(
        lambda _module, _args, options: batches.append(len(options["input_ids"])), with_kwargs=True
    )
    torch.testing.assert_close(tiny_model.variants(ids_1T, place, x_FTD), expected, rtol=0, atol=1e-6)
    handle.remove()
    assert batches == [1]


def test_estimate_equals_finite_differences(
    run: Path, tiny_model: Model, tiny_cache: ActivationCache, hook: str
) -> None:
    sae, step = load(run), 1e-2
    found = loss_effects(run, tiny_cache, tiny_model, contexts=1, **SMALL)
    drawn = {p.ctx: p for p in draw_contexts(tiny_cache, 6, rows="held-out", seed=0)}
    for pair in found.pairs.nlargest(8, "n_firings").to_dict("records"):
        up, down = (
            losses(tiny_model, drawn[pair["ctx"]].ids_T, {hook: scaled(sae, pair["feature"], 1 + h)})[1]
            for h in (step, -step)
        )
        slope = float(down - up) / (2 * step)
        assert pair["estimate"] == pytest.approx(slope, abs=2e-2 * abs(slope) + 2e-3)
    assert found.correlation is not None and found.correlation > 0.8


def test_features_are_means_of_their_pairs(run: Path, tiny_cache: ActivationCache, tiny_model: Model) -> None:
    found = loss_effects(run, tiny_cache, tiny_model, contexts=2, **SMALL)
    features = found.features.set_index("feature")
    assert len(features) == 96
    sums = found.pairs.groupby("feature")[["effect", "kl", "n_tokens"]].sum()
    counts = found.pairs.groupby("feature").size()
    for feature, row in features.iterrows():
        assert row["loss_effect_n"] == counts.get(feature, 0) <= 2
        assert row["loss_effect_n"] == min(2, row["loss_estimate_n"])
        assert np.isnan(row["loss_effect"]) == (row["loss_effect_n"] == 0) == np.isnan(row["loss_estimate"])
        if row["loss_effect_n"]:
            for column, summed in (("loss_effect", "effect"), ("kl", "kl")):
                assert row[column] == pytest.approx(sums[summed][feature] / sums["n_tokens"][feature])
    assert (features["loss_effect_n"] > 0).sum() > 30
    # With one context the estimate of the feature equals that of its pair.
    whole = features[features["loss_estimate_n"] == 1].index
    pairs = found.pairs.set_index("feature")
    expected = pairs["estimate"][whole] / pairs["n_tokens"][whole]
    np.testing.assert_allclose(features["loss_estimate"][whole], expected, rtol=1e-6)


def test_estimates_do_not_depend_on_contexts_and_equal_seeds_repeat(
    run: Path, tiny_cache: ActivationCache, tiny_model: Model
) -> None:
    found = loss_effects(run, tiny_cache, tiny_model, contexts=1, **SMALL)
    alone = loss_effects(run, tiny_cache, tiny_model, contexts=0, **SMALL)
    columns = ["feature", "loss_estimate", "loss_estimate_n"]
    pd.testing.assert_frame_equal(alone.features[columns], found.features[columns])
    assert alone.pairs.empty and alone.correlation is None
    again = loss_effects(run, tiny_cache, tiny_model, contexts=1, **SMALL)
    pd.testing.assert_frame_equal(again.pairs, found.pairs)
    few = loss_effects(run, tiny_cache, tiny_model, features=[3, 1], contexts=1, **SMALL)
    pd.testing.assert_frame_equal(
        few.pairs, found.pairs[found.pairs["feature"].isin([1, 3])].reset_index(drop=True)
    )


def test_contexts_are_drawn_from_held_out_ones(tiny_cache: ActivationCache) -> None:
    drawn = draw_contexts(tiny_cache, 10_000, rows="held-out", seed=1)
    held_out = {int(ctx) for ctx in tiny_cache.ctx[tiny_cache.held_out]}
    assert {place.ctx for place in drawn} == held_out and len(drawn) == len(held_out)
    every = draw_contexts(tiny_cache, 10_000, rows="all", seed=1)
    assert len(every) == tiny_cache.n_contexts
    for place in every[:5]:
        rows = tiny_cache.ctx == place.ctx
        assert place.positions.tolist() == tiny_cache.pos[rows].tolist()
        assert place.ids_T[place.positions].tolist() == tiny_cache.tokens[rows].tolist()
    assert draw_contexts(tiny_cache, 3, rows="all", seed=1)[2].ctx == every[2].ctx
    assert [p.ctx for p in draw_contexts(tiny_cache, 9, rows="all", seed=2)] != [p.ctx for p in every[:9]]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, run: Path, tiny_cache: ActivationCache) -> Path:
    out = tmp_path_factory.mktemp("stores") / "store"
    sb.index(run=run, cache=tiny_cache.path, out=out, quiet=True).close()
    return out


def test_index_effects_publishes_sortable_columns(
    stored: Path, run: Path, tiny_cache: ActivationCache, tiny_model: Model,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = ["effects", str(stored), "--run", str(run), "--contexts", "1", "--sample", "6", "--quiet"]
    assert main([*words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    expected = loss_effects(run, tiny_cache, tiny_model, contexts=1, **SMALL)
    assert answer["n_pairs"] == len(expected.pairs) and answer["correlation"] == expected.correlation
    assert check_store(stored) == []
    with sb.open_store(stored) as store:
        frame = store.features(order_by="loss_effect", descending=True).dropna(subset="loss_effect")
        wanted = expected.features.set_index("feature")
        assert frame["loss_effect"].is_monotonic_decreasing
        assert len(frame) == answer["n_measured"] == (wanted["loss_effect_n"] > 0).sum()
        for name in wanted:
            np.testing.assert_array_equal(frame[name], wanted[name][frame["feature"]])
        dead = store.features(ranges={"n_act": (0, 0)})
        assert dead["loss_effect_n"].isna().all()


def test_sae_not_in_the_store_raises_user_error(
    stored: Path, tmp_path: Path, make_sae: Callable[[str], SAE], tiny_cache: ActivationCache, hook: str
) -> None:
    make_sae("relu").save(tmp_path / "other", hook_name=hook, model=tiny_cache.model)
    with pytest.raises(UserError, match=r"does not have the SAE .*other.*; run saebench index"):
        sb.index_effects(stored, run=tmp_path / "other", cache=tiny_cache.path, quiet=True)
    with pytest.raises(UserError, match=r"other does not say which cache .*; name it with --cache"):
        sb.index_effects(stored, run=tmp_path / "other", quiet=True)


def test_locked_store_raises_before_measuring(
    stored: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saebench.sources.models.load_model", lambda *_, **__: pytest.fail("measured"))
    with (
        directory_lock(stored, what="the feature store"),
        pytest.raises(UserError, match="another process is writing the feature store"),
    ):
        sb.index_effects(stored, run=run, quiet=True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"contexts": -1}, "contexts is -1; give a whole number, at least 0"),
        ({"sample": 0}, "sample is 0; give a whole number, at least 1"),
        ({"seed": 1.5}, "seed is 1.5; give a whole number"),
        ({"rows": "training"}, "rows is 'training'; give 'held-out' or 'all'"),
        ({"features": 96}, "feature is 96, but the SAE has 96 latents"),
        ({"hook": "blocks.7.hook_resid_post"}, "blocks.7"),
    ],
)
def test_invalid_arguments_raise_user_error(
    run: Path, tiny_cache: ActivationCache, tiny_model: Model, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        loss_effects(**{"sae": run, "cache": tiny_cache, "model": tiny_model, "quiet": True, **changes})


def test_cache_of_other_model_or_without_contexts_raises_user_error(
    run: Path, tiny_cache: ActivationCache, tiny_model: Model, hook: str, tmp_path: Path,
    make_cache: Callable[..., ActivationCache], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    imported = make_cache(tmp_path / "imported", torch.randn(50, 32), hook=hook)
    with pytest.raises(UserError, match="was imported without tokens"):
        loss_effects(run, imported, tiny_model, quiet=True)
    other = dataclasses.replace(tiny_model.info, hash="0" * 64, identity="1" * 64)
    monkeypatch.setattr(tiny_model, "info", other)
    with pytest.raises(UserError, match="their hashes differ"):
        loss_effects(load(run), tiny_cache, tiny_model, hook, quiet=True)
