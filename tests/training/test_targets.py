"""Training of transcoders and crosscoders: sites, scales, resume, sweeps, refusals."""

from __future__ import annotations

import json

import pytest
import torch

import saebench as sb
from saebench.activations.writing import Target, write_cache
from saebench.core.errors import UserError
from saebench.runs.run import load
from saebench.saes.registry import ARCHITECTURES, architecture
from saebench.sources.base import ColumnType, Site, UnitBatch
from saebench.training import sweep, train
from saebench.training.checkpoint import latest_checkpoint


class Arrays:
    """A source of rows in memory: sites by name, and gradients at some of them."""

    modality, kind = "none", "import"

    def __init__(self, sites, gradients=None):
        self._sites, self._gradients = sites, gradients or {}

    def identity(self):
        return {"settings": {"sites": {name: float(x.double().sum()) for name, x in self._sites.items()}}}

    def prepare(self):
        pass

    def open(self):
        return {name: Site(name, (("d", x.shape[1]),), "fp32", "array") for name, x in self._sites.items()}

    def columns(self):
        values = {name: ColumnType("fp32", (x.shape[1],)) for name, x in self._values().items()}
        return {**values, "held_out": ColumnType("bool")}

    def _values(self):
        values = {f"hook/{name}": x for name, x in self._sites.items()}
        return values | {f"gradient/{name}": x for name, x in self._gradients.items()}

    def batches(self):
        n_rows = len(next(iter(self._sites.values())))
        held_out = torch.arange(n_rows) >= n_rows * 19 // 20
        yield UnitBatch({"held_out": held_out}, {}, self._values)

    def files(self):
        return {}

    def nonfinite(self, column, batch, row):
        return f"{column} is not finite in row {row}"


@pytest.fixture(scope="session")
def cache_of(tmp_path_factory):
    """``cache_of({"a": rows, ...}, gradients)``: a cache of several sites."""

    def make(sites, gradients=None):
        target = Target(out=tmp_path_factory.mktemp("sites") / "c", shard_rows=32_768, quiet=True)
        return write_cache(Arrays(sites, gradients), target)[0]

    return make


@pytest.fixture(scope="session")
def mlp(cache_of, sparse_rows):
    """Rows x at site ``in`` and y = W_2 relu(W_1 x) + 50 at ``out``, of a hundredth of the size."""
    generator = torch.Generator().manual_seed(3)
    W1, W2 = (torch.randn(shape, generator=generator) for shape in ((16, 48), (48, 10)))
    out = 0.01 * ((sparse_rows - 2) @ W1).relu() @ W2 + 50
    return cache_of(
        {"in": sparse_rows, "out": out, "again": sparse_rows[:, :8] * 30},
        {"out": torch.randn(out.shape, generator=generator)},
    )


@pytest.fixture
def of_mlp(settings, mlp):
    return {**settings, "cache": mlp.path, "hook": "in", "target": "out"}


def fvu(sae, cache, site="in", target="out"):
    x_ND, y_NE = (cache.activations(name)[cache.held_out] for name in (site, target))
    return float((y_NE - sae(x_ND)).square().sum() / (y_NE - y_NE.mean(0)).square().sum())


def test_a_transcoder_learns_its_target_and_records_its_sites(of_mlp, mlp, tmp_path):
    long = {**of_mlp, "tokens": 600 * 128, "k": 8, "checkpoint_every": 1000}
    run = train(**long)
    sae = load(run.path)
    assert fvu(sae, mlp) < 0.2
    description = json.loads((run.path / "sae.json").read_text())
    assert description["spec"]["sites"] == [{"name": "in", "width": 16}]
    assert description["spec"]["targets"] == [{"name": "out", "width": 10}]
    assert description["hook_name"] == "in" and description["d_in"] == 16
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64), rtol=1e-4, atol=1e-4)
    skipping = train(**{**long, "out": tmp_path / "skip", "skip": True})
    assert fvu(load(skipping.path), mlp) < fvu(sae, mlp)


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if not architecture(n).tied])
def test_stopped_and_resumed_a_transcoder_ends_with_the_same_bytes(
    name, of_mlp, mlp, tmp_path, files_of, stop_after
):
    whole = train(**of_mlp, sae=name, skip=True)
    again = {**of_mlp, "out": tmp_path / "again"}
    with stop_after(37, KeyboardInterrupt()):
        train(**again, sae=name, skip=True)
    assert latest_checkpoint(tmp_path / "again") is not None
    train(**again, sae=name, skip=True, resume=True)
    assert files_of(tmp_path / "again") == files_of(whole.path)
    # A checkpoint is folded as the finished run is.
    early, last = load(latest_checkpoint(whole.path)), load(whole.path)
    for weight in ("W_enc_MD", "W_dec", "b_dec", "b_in", "W_skip"):
        assert torch.equal(getattr(early, weight), getattr(last, weight)), weight


def test_resume_without_a_setting_that_the_run_was_begun_with_raises_user_error(of_mlp, tmp_path):
    long = {**of_mlp, "out": tmp_path / "run"}
    train(**long, skip=True)
    with pytest.raises(UserError, match="was begun with --skip True and this call does not"):
        train(**long, resume=True)
    with pytest.raises(UserError, match=r"was begun with --target .*'out'.* and this call does not"):
        train(**{**long, "target": ()}, resume=True)
    train(**long, skip=True, resume=True)


def test_one_sweep_of_transcoders_gives_the_bytes_of_single_trainings(of_mlp, tmp_path, files_of):
    runs = sweep({"sae": ["topk", "mutual-choice", "gradient"]}, **of_mlp | {"out": tmp_path / "runs"})
    for run in runs:
        alone = train(**of_mlp | {"out": tmp_path / run.path.name}, sae=run.path.name)
        assert files_of(alone.path) == files_of(run.path)


def test_a_crosscoder_of_equal_scales_is_the_sae_of_the_joined_site(
    settings, cache_of, sparse_rows, tmp_path, files_of
):
    """Each site has its own scale; without scaling, it is to the bit the SAE of the sites side by side."""
    common = {**settings, "normalize": False, "out": tmp_path / "joined"}
    joined = train(**{**common, "cache": cache_of({"ab": sparse_rows}).path})
    parts = cache_of({"a": sparse_rows[:, :6], "b": sparse_rows[:, 6:]})
    crossed = train(**{**common, "cache": parts.path, "out": tmp_path / "crossed", "crosscoder": True})
    files = [files_of(run.path) for run in (joined, crossed)]
    assert files[0]["sae.safetensors"] == files[1]["sae.safetensors"]
    assert [site.name for site in load(crossed.path).spec.sites] == ["a", "b"]
    named = train(
        **{**common, "cache": parts.path, "out": tmp_path / "named", "crosscoder": True, "hook": ("a", "b")}
    )
    assert files_of(named.path)["sae.safetensors"] == files[1]["sae.safetensors"]


def test_sites_of_very_different_size_count_alike(settings, mlp):
    run = train(**{**settings, "cache": mlp.path, "crosscoder": True, "k": 8, "tokens": 600 * 128})
    sae = load(run.path)
    x_ND = torch.cat([mlp.activations(name)[mlp.held_out] for name in ("in", "out", "again")], dim=1)
    error, rows = sae.split(x_ND - sae(x_ND)), sae.split(x_ND)
    shares = {
        name: float(error[name].square().sum() / (rows[name] - rows[name].mean(0)).square().sum())
        for name in rows
    }
    assert max(shares.values()) < 0.5, shares


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"target": "nothing"}, "has no hook 'nothing'"),
        ({"target": "in"}, "--target is the site that is read"),
        ({"hook": ("in", "again"), "target": ()}, "--site names several sites; pass --crosscoder"),
        ({"hook": ("in", "in")}, "--site names the same site twice"),
        ({"crosscoder": True}, "a crosscoder reconstructs the sites that it reads"),
        ({"target": (), "crosscoder": True}, "--crosscoder joins several sites, but --site names in alone"),
        ({"target": (), "skip": True}, "no target is named"),
        ({"sae": "matching-pursuit"}, "one dictionary that is encoder and decoder"),
        ({"sae": "gradient", "target": "again"}, "has no gradients at again"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(of_mlp, changed, sentence):
    with pytest.raises(UserError, match=sentence):
        train(**of_mlp | changed)
    assert not of_mlp["out"].exists()


def test_several_inputs_and_several_targets_go_side_by_side(of_mlp, mlp):
    run = sb.train(**{**of_mlp, "hook": ("in", "again"), "target": ("out", "again"), "sae": "mutual-choice"})
    sae = load(run.path)
    x_ND = torch.cat([mlp.activations(name)[:5] for name in ("in", "again")], dim=1)
    assert {name: part.shape[1] for name, part in sae.split(x_ND).items()} == {"in": 16, "again": 8}
    written = sae.split(sae(x_ND), of=sae.spec.targets)
    assert {name: part.shape[1] for name, part in written.items()} == {"out": 10, "again": 8}
