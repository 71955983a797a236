"""Stores of transcoders and crosscoders: codes of all sites, logits of the target, norms per site, checks."""

from __future__ import annotations

import json
import shutil

import duckdb
import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import saebench as sb
from saebench.core.errors import UserError
from saebench.sources.models import load_model
from saebench.store import check_store, open_store, publish
from saebench.store.build import index
from saebench.store.rebuild import rebuild_store
from saebench.store.schema import FEATURE
from tests.store.small_store import D_IN, HOOK
from tests.store.two_sided import (
    D_SAE,
    FIRST,
    FIRST_ONLY,
    LAST,
    LAST_ONLY,
    NOTHING,
    OPPOSED,
    READ,
    WRITTEN,
    build_two_sided,
)


@pytest.fixture(scope="module")
def both(tmp_path_factory, tiny_model_folder, tiny_text):
    return build_two_sided(tmp_path_factory.mktemp("sides"), tiny_model_folder, tiny_text)


def rows(both, *sites):
    return torch.cat([both.cache.activations(site.name) for site in sites], dim=1)


@pytest.mark.parametrize(("name", "sites"), [("transcoder", [READ]), ("crosscoder", [FIRST, LAST])])
def test_activations_are_the_codes_of_all_sites_side_by_side(both, name, sites):
    codes_NM = both.sae(name).encode(rows(both, *sites)).to_dense().detach()
    with open_store(both.store, name) as store:
        assert store.features()["n_act"].tolist() == (codes_NM != 0).sum(0).tolist()
        total = store.sql("SELECT feature, sum(value) AS total FROM act GROUP BY feature ORDER BY feature")
    expected = codes_NM.double().sum(0)[torch.tensor(total["feature"].tolist())]
    np.testing.assert_allclose(total["total"], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "part"), [("transcoder", slice(None)), ("crosscoder", slice(FIRST.width, None))]
)
def test_logits_are_those_of_the_last_target_in_the_residual_stream(both, tiny_model_folder, name, part):
    W_U_DV = load_model(str(tiny_model_folder)).unembedding()
    effects_MV = both.sae(name).W_dec.detach()[:, part] @ W_U_DV
    with open_store(both.store, name) as store:
        for feature in (1, 7, 20):
            logits = store.logits(feature)
            up = logits[logits["sign"] == 1]["value"].to_numpy()
            np.testing.assert_allclose(up, effects_MV[feature].topk(len(up)).values, rtol=1e-4, atol=1e-6)


def test_info_names_both_sides(both, small_store):
    with open_store(both.store, "transcoder") as store:
        info = store.info()
        assert info["sites"] == [{"name": READ.name, "width": 128}] and info["hook_name"] == READ.name
        assert info["targets"] == [{"name": WRITTEN.name, "width": 32}] and info["skip"] is True
        assert store.features()["enc_dec_cos"].isna().all()
        assert store.feature_columns == FEATURE.names
        with pytest.raises(UserError, match=r"'transcoder' .* is not a crosscoder"):
            store.site_norms(0)
        compared = store.compare().set_index("name")
        assert compared.loc["transcoder", ["reads", "writes"]].tolist() == [READ.name, WRITTEN.name]
    with open_store(both.store, "crosscoder") as store:
        info = store.info()
        assert info["sites"] == info["targets"] == [{"name": s.name, "width": 32} for s in (FIRST, LAST)]
        assert info["hook_name"] == FIRST.name and info["skip"] is False
    with open_store(small_store) as store:
        info = store.info()
        assert info["sites"] == info["targets"] == [{"name": HOOK, "width": D_IN}] and info["skip"] is False


def test_norm_shares_are_in_units_of_each_sites_standard_deviation(both):
    parts_MSD = both.sae("crosscoder").W_dec.detach().view(D_SAE, 2, 32)
    std = [float(rows(both, site).double().var(0, correction=0).mean().sqrt()) for site in (FIRST, LAST)]
    norms_MS = parts_MSD.norm(dim=2).double() / torch.tensor(std, dtype=torch.float64)
    share_MS = norms_MS / norms_MS.sum(1, keepdim=True)
    with open_store(both.store, "crosscoder") as store:
        assert store.info()["site_std"] == pytest.approx(std)
        frame = store.features()
        for feature in (5, FIRST_ONLY, LAST_ONLY):
            sites = store.site_norms(feature)
            assert sites["name"].tolist() == [FIRST.name, LAST.name]
            np.testing.assert_allclose(sites["norm"], norms_MS[feature], rtol=1e-5)
            np.testing.assert_allclose(sites["share"], share_MS[feature], rtol=1e-5)
        exclusive = store.features(["feature"], flags={"exclusive": True}, ranges={"norm_share": (0.7, 1)})
        ordered = store.features(["norm_share"], order_by="norm_share", descending=True)["norm_share"]
    np.testing.assert_allclose(frame["norm_share"], share_MS[:, 1], rtol=1e-5)
    assert LAST_ONLY in exclusive["feature"].tolist() and FIRST_ONLY not in exclusive["feature"].tolist()
    assert ordered[:-1].is_monotonic_decreasing and np.isnan(ordered.iloc[-1])
    assert frame["main_site"][[FIRST_ONLY, LAST_ONLY]].tolist() == [FIRST.name, LAST.name]
    assert frame["exclusive"].tolist() == (share_MS.max(1).values > 0.7).tolist()
    assert frame["site_cos"][OPPOSED] == pytest.approx(-1)
    assert frame["main_site"].isna()[NOTHING] and not frame["exclusive"][NOTHING]


def test_neighbors_of_a_crosscoder_are_in_units_of_each_site(both):
    with open_store(both.store, "crosscoder") as store:
        std = torch.tensor(store.info()["site_std"]).repeat_interleave(32)
        rows_MD = torch.nn.functional.normalize(both.sae("crosscoder").W_dec.detach() / std)
        near = store.neighbors(7)
    cosine_M = (rows_MD @ rows_MD[7]).index_fill(0, torch.tensor([7]), -2)
    np.testing.assert_allclose(near["cosine"], cosine_M.topk(len(near)).values, atol=1e-5)


def test_check_of_intact_store_against_runs_cache_and_model_finds_nothing(both):
    assert check_store(both.store) == []
    for run in both.runs.values():
        assert check_store(both.store, run=run, cache=both.cache.path, model="cache") == []


PLANTED = {
    "a feature is missing": "DELETE FROM crosscoder WHERE feature = 5",
    "a share is wrong": "UPDATE site_norm SET share = share * 1.01 WHERE feature = 5 AND site = 0",
    "a norm is negative": "UPDATE site_norm SET norm = -norm WHERE feature = 5",
    "a site is missing": "DELETE FROM site_norm WHERE feature = 5 AND site = 1",
    "the sites have other names": "UPDATE site_norm SET name = 'x' WHERE feature = 5 AND site = 1",
    "the share of the last site is another": "UPDATE crosscoder SET norm_share = 0.5 WHERE feature = 5",
    "the main site is another": (
        f"UPDATE crosscoder SET main_site = '{FIRST.name}' WHERE feature = {LAST_ONLY}"
    ),
    "exclusive is wrong": f"UPDATE crosscoder SET exclusive = false WHERE feature = {LAST_ONLY}",
}
CONSISTENT = {
    "norms are twice as large": "UPDATE site_norm SET norm = 2 * norm",
    "cosines have the other sign": "UPDATE crosscoder SET site_cos = -site_cos",
}


@pytest.mark.parametrize("name", [*PLANTED, *CONSISTENT])
def test_check_finds_planted_corruption_of_sites(both, tmp_path, name):
    store = shutil.copytree(both.store, tmp_path / "store")
    [file] = store.rglob("sites-*.duckdb")
    old = publish.describe(file).sha256
    with duckdb.connect(str(file)) as connection:
        connection.execute({**PLANTED, **CONSISTENT}[name])
        connection.execute("CHECKPOINT")
    new = publish.describe(file)
    for manifest in store.rglob("manifest.json"):
        content = manifest.read_text().replace(old, new.sha256)
        parsed = json.loads(content)
        for sae in parsed["saes"]:
            for extra in sae["extras"].values():
                extra["bytes"] = new.bytes
        manifest.write_text(json.dumps(parsed))
    if name in CONSISTENT:
        assert check_store(store) == []
    assert check_store(store, run=both.runs["crosscoder"] if name in CONSISTENT else None)


def test_rebuilt_store_keeps_both_sides(both, tmp_path):
    store = shutil.copytree(both.store, tmp_path / "store")
    with open_store(store, "crosscoder") as opened:
        before, info = opened.features(), opened.info()
    rebuild_store(store)
    assert check_store(store) == []
    with open_store(store, "crosscoder") as opened:
        assert opened.features().equals(before)
        assert {**opened.info(), "generation": 0} == {**info, "generation": 0}


def test_a_cache_without_a_site_is_refused(both, tmp_path, tiny_cache):
    with pytest.raises(UserError, match=r"blocks\.0\.mlp\.hook_post.*is what .*transcoder was trained on"):
        index(run=both.runs["transcoder"], cache=tiny_cache.path, out=tmp_path / "store", quiet=True)
    with pytest.raises(UserError, match="leave --site out"):
        index(
            run=both.runs["crosscoder"], cache=tiny_cache.path, out=tmp_path / "store", quiet=True,
            hook=FIRST.name,
        )  # fmt: skip
    assert not (tmp_path / "store").exists()


@pytest.fixture(scope="module")
def two_models(tmp_path_factory, tiny_model_folder, tiny_text):
    """``(store, run, cache)`` of a crosscoder of the tiny model and a narrower one."""
    folder = tmp_path_factory.mktemp("models")
    other = shutil.copytree(tiny_model_folder, folder / "other")
    torch.manual_seed(1)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=400, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
    ).save_pretrained(other)
    cache = sb.harvest(
        model=(str(tiny_model_folder), str(other)), text=str(tiny_text), site=FIRST.name, tokens=700, ctx=32,
        out=folder / "cache", quiet=True,
    )  # fmt: skip
    run = sb.train(
        cache=cache.path, out=folder / "run", crosscoder=True, d_sae=16, k=4, tokens=1000, batch_size=100,
        quiet=True,
    )  # fmt: skip
    return sb.index(run=run.path, cache=cache.path, out=folder / "store", quiet=True), run, cache


def test_a_crosscoder_of_two_models_names_them_and_has_no_logits(two_models, tiny_model_folder):
    store, run, cache = two_models
    info = store.info()
    assert [site["name"] for site in info["sites"]] == [f"0:{FIRST.name}", f"1:{FIRST.name}"]
    assert info["models"][0] == str(tiny_model_folder) and len(info["models"]) == 2
    assert "several models" in info["missing"]["logit"]
    assert store.features()["site_cos"].isna().all()
    found = sb.crosscoder_sites(run.path)
    last = found[f"share 1:{FIRST.name}"]
    np.testing.assert_allclose(store.features()["norm_share"], last, rtol=1e-5)
    exclusive = (found["kind"] != "shared").tolist()
    assert store.features()["exclusive"].tolist() == exclusive
    assert check_store(store.path, run=run.path, cache=cache.path) == []


@pytest.mark.parametrize("format", ["parquet", "html", "neuronpedia", "delphi"])
def test_both_sides_are_exported(both, tmp_path, format):
    for name in both.runs:
        out = tmp_path / name
        sb.export_store(store=both.store, out=out, format=format, sae=name, features=("1-3",), quiet=True)
        if format == "html":
            [page] = out.iterdir()
            sides = {
                "transcoder": f"{READ.name} → {WRITTEN.name}",
                "crosscoder": f"{FIRST.name}, {LAST.name}",
            }
            assert sides[name] in page.read_text("utf-8")
        if format == "parquet":
            assert (out / "crosscoder.parquet").exists() == (name == "crosscoder")
