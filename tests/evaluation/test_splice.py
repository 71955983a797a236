"""Transcoders and crosscoders in a model: evaluation, edits and attributions against edits by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import saebench as sb
from saebench.core.errors import UserError
from saebench.evaluation.faithfulness import cross_entropies
from saebench.evaluation.samples import cache_contexts, choose_rows
from saebench.runs.run import load
from saebench.sources.models import load_model

MLP = [(f"blocks.{i}.ln2.hook_normalized", f"blocks.{i}.hook_mlp_out") for i in range(2)]
RESID = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")


@pytest.fixture(scope="module")
def cache(tiny_model_folder, tiny_text, tmp_path_factory):
    return sb.harvest(
        model=str(tiny_model_folder), text=str(tiny_text), out=tmp_path_factory.mktemp("c") / "cache",
        site=[*(name for pair in MLP for name in pair), *RESID], tokens=100_000, ctx=32, quiet=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    """The transcoders of both layers, one with a skip connection, and a crosscoder, by name."""
    common = {"cache": cache.path, "d_sae": 64, "k": 8, "tokens": 40_000, "batch_size": 500, "quiet": True}
    out = tmp_path_factory.mktemp("runs")
    for i, (site, target) in enumerate(MLP):
        sb.train(**common, out=out / f"mlp{i}", site=site, target=target, skip=i == 1)
    sb.train(**common, out=out / "cross", site=RESID, crosscoder=True)
    return out


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    return load_model(str(tiny_model_folder))


def by_hand(model, contexts, edit_of):
    """CE of the scored predictions with ``edit_of(batch)`` in the model."""
    total, n = 0.0, 0
    for batch in contexts.batches(4):
        scored = batch.scored()
        total += cross_entropies(model.logits(batch.tokens_BT, edit=edit_of(batch)), scored).sum().item()
        n += len(scored[0])
    return total / n


@pytest.mark.parametrize("layer", [0, 1])
def test_evaluation_replaces_the_target_by_what_the_transcoder_writes(cache, trained, model, layer):
    site, target = MLP[layer]
    report = sb.evaluate(trained / f"mlp{layer}", model="cache", tokens=300, quiet=True)
    sae, row_N = load(trained / f"mlp{layer}"), choose_rows(cache, rows="held-out", tokens=300)
    x_ND, y_NE = (cache.activations(name)[row_N].float() for name in (site, target))
    with torch.no_grad():
        error = (y_NE - sae(x_ND)).double().square().sum()
    variance = (y_NE.double() - y_NE.double().mean(0)).square().sum()
    assert report.fvu == pytest.approx(float(error / variance), rel=1e-5)
    assert (report.sites, report.targets, report.hook_name) == ([site], [target], site)

    def written(batch):
        """From the clean activations: what the transcoder reads comes before what it writes."""
        with torch.no_grad():
            x_BTD = model.run_to(batch.tokens_BT, [site])[site]
            new_BTE = sae(x_BTD)
        return {target: lambda y_BTE: torch.where(batch.keep_BT[..., None], new_BTE, y_BTE)}

    contexts = cache_contexts(cache, row_N)
    assert report.ce_spliced == pytest.approx(by_hand(model, contexts, written), rel=1e-5)
    zeros = by_hand(model, contexts, lambda batch: {target: lambda y: y * ~batch.keep_BT[..., None]})
    assert report.ce_zero == pytest.approx(zeros, rel=1e-5)


def test_together_each_transcoder_reads_what_those_before_it_have_changed(cache, trained, model):
    report = sb.evaluate(trained / "mlp0", model="cache", together=[trained / "mlp1"], tokens=300, quiet=True)
    assert (trained / "mlp0" / "eval-together.json").exists()
    saes = [load(trained / f"mlp{layer}") for layer in (0, 1)]

    def written(batch):
        keep = batch.keep_BT[..., None]
        with torch.no_grad():
            first = saes[0](model.run_to(batch.tokens_BT, [MLP[0][0]])[MLP[0][0]])
        read = {}

        def second(y_BTE):
            with torch.no_grad():
                return torch.where(keep, saes[1](read["x"]), y_BTE)

        return {
            MLP[0][1]: lambda y_BTE: torch.where(keep, first, y_BTE),
            MLP[1][0]: lambda x_BTD: read.update(x=x_BTD) or x_BTD,
            MLP[1][1]: second,
        }

    contexts = cache_contexts(cache, choose_rows(cache, rows="held-out", tokens=300))
    assert report.ce_spliced == pytest.approx(by_hand(model, contexts, written), rel=1e-5)
    with pytest.raises(UserError, match=r"two runs write blocks\.0\.hook_mlp_out"):
        sb.evaluate(trained / "mlp0", model="cache", together=[trained / "mlp0"], tokens=300, quiet=True)


def test_a_crosscoder_replaces_all_its_sites_and_tells_the_fvu_of_each(cache, trained, model):
    report = sb.evaluate(trained / "cross", model="cache", tokens=300, quiet=True)
    sae, row_N = load(trained / "cross"), choose_rows(cache, rows="held-out", tokens=300)
    for name in RESID:
        x_ND = torch.cat([cache.activations(site)[row_N].float() for site in RESID], dim=1)
        with torch.no_grad():
            error_ND = sae.split((x_ND - sae(x_ND)).double())[name]
        part_ND = sae.split(x_ND.double())[name]
        own = error_ND.square().sum() / (part_ND - part_ND.mean(0)).square().sum()
        assert report.fvu_by_site[name] == pytest.approx(float(own), rel=1e-5)

    def written(batch):
        found = model.run_to(batch.tokens_BT, RESID)
        with torch.no_grad():
            parts = sae.split(sae(torch.cat([found[name] for name in RESID], dim=-1)))
        keep = batch.keep_BT[..., None]
        return {name: lambda x, name=name: torch.where(keep, parts[name], x) for name in RESID}

    contexts = cache_contexts(cache, row_N)
    assert report.ce_spliced == pytest.approx(by_hand(model, contexts, written), rel=1e-5)


@pytest.mark.parametrize("name", ["mlp0", "mlp1", "cross"])
def test_prompts_and_edits_use_what_the_sae_reads_and_writes(trained, model, name):
    text = "The Congress of the United States"
    found = sb.features_of(text, trained / name, model)
    assert len(found) > 0
    top = found[~found["first"]].sort_values("value").iloc[-1]
    feature, at = int(top["feature"]), int(top["pos"])
    edited = sb.ablate(text, feature, trained / name, model, positions=[at])
    sae, ids = load(trained / name), torch.tensor([model.tokens.encode(text)])
    taken = float(top["value"]) * sae.W_dec[feature].detach()
    parts = sae.split(taken, of=sae.spec.targets)

    def take(part):
        def edit(y_BTE):
            y_BTE = y_BTE.clone()
            y_BTE[0, at] -= part
            return y_BTE

        return edit

    logits = model.logits(ids, edit={target: take(part) for target, part in parts.items()})
    logp = logits.float().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(
        torch.tensor(edited["logp_edited"].tolist()[:-1], dtype=torch.float32), logp, rtol=1e-4, atol=1e-4
    )
    blame = sb.logit_attribution(text, trained / name, model, check=1)
    assert blame.latents["effect"].notna().sum() == 1
    effects = sb.loss_effects(trained / name, contexts=1, sample=4, quiet=True)
    assert effects.features["loss_effect"].notna().any()


def test_on_a_text_the_target_is_measured_too(trained, tiny_text):
    on_text = sb.evaluate(
        trained / "mlp0", model="cache", text=str(tiny_text), tokens=300, rows="all", quiet=True
    )
    on_cache = sb.evaluate(trained / "mlp0", model="cache", tokens=300, quiet=True)
    assert on_text.fvu == pytest.approx(on_cache.fvu, rel=0.5) and 0 < on_text.fvu < 1


def test_what_does_not_fit_is_refused(trained, cache, tmp_path):
    with pytest.raises(UserError, match=r"--site blocks.0.hook_mlp_out: .* leave --site out"):
        sb.evaluate(trained / "mlp0", site="blocks.0.hook_mlp_out", quiet=True)
    backwards = sb.train(
        cache=cache.path, out=tmp_path / "backwards", site=RESID[1], target=RESID[0],
        d_sae=32, k=4, tokens=2000, batch_size=500, quiet=True,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"computes the target blocks.0.hook_resid_post before blocks.1"):
        sb.evaluate(backwards, model="cache", tokens=300, quiet=True)
    of_two = load(trained / "cross")
    sites = tuple(
        dataclasses.replace(site, name=f"{i}:{site.name}") for i, site in enumerate(of_two.spec.sites)
    )
    of_two.spec = dataclasses.replace(of_two.spec, sites=sites, targets=sites)
    of_two.save(Path(tmp_path / "two"), hook_name=sites[0].name, model=None)
    with pytest.raises(UserError, match="sites of several models"):
        sb.features_of("The Congress", load(tmp_path / "two"), "demo", sites[0].name)
