"""Training on a cache with gradients: gradient SAEs get them, and other architectures do not change."""

import json

import numpy as np
import pytest
import torch

from saebench.cli import main
from saebench.core.errors import UserError
from saebench.runs.run import load
from saebench.training import sweep, train
from tests.training.test_resume import KILL, run_victim


@pytest.fixture(scope="session")
def gradient_cache(make_cache, sparse_rows, tmp_path_factory):
    """The sparse rows again, with gradients along the first two dimensions alone."""
    folder = tmp_path_factory.mktemp("caches")
    gradients_ND = torch.zeros_like(sparse_rows)
    gradients_ND[:, :2] = 0.01 * torch.randn(len(sparse_rows), 2, generator=torch.Generator().manual_seed(1))
    np.save(folder / "g.npy", gradients_ND.numpy())
    return make_cache(folder / "gradients", sparse_rows, gradients=folder / "g.npy")


@pytest.fixture
def gradient_settings(settings, gradient_cache):
    return {**settings, "cache": gradient_cache.path, "sae": "gradient", "beta": 3.0}


def test_metrics_hold_the_share_of_picks_that_differ_from_topk(gradient_settings):
    run = train(**gradient_settings)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 9 and all(0 < line["picks_changed"] < 1 for line in lines)
    sae = load(run.path)
    assert sae.gradient_scale > 0 and sae.influence.shape == (64,)
    first, others = sae.W_dec[:, :2].norm(dim=1), sae.influence
    assert torch.corrcoef(torch.stack([first, others]))[0, 1] > 0.9


def test_the_table_of_a_sweep_shows_it(gradient_settings, capsys):
    words = ["train", "--sweep", "sae=topk,gradient", "--quiet", "--cache", str(gradient_settings["cache"])]
    for name in ("out", "d_sae", "k", "tokens", "batch_size", "device"):
        words += [f"--{name.replace('_', '-')}", str(gradient_settings[name])]
    assert main(words) == 0
    head, topk, gradient = capsys.readouterr().out.splitlines()[:3]
    assert head.endswith("  picks changed") and len(topk) < head.index("picks changed")
    last = (gradient_settings["out"] / "gradient" / "metrics.jsonl").read_text().splitlines()[-1]
    assert gradient.split()[-1] == f"{json.loads(last)['picks_changed']:.4f}"


def test_killed_and_resumed_it_ends_with_the_same_bytes(gradient_settings, tmp_path, files_of):
    undisturbed = gradient_settings | {"out": tmp_path / "undisturbed"}
    train(**undisturbed)
    for at in (3, 17):
        assert run_victim(gradient_settings | {"resume": True}, where="step", at=at, signal=KILL) == -KILL
    train(**gradient_settings, resume=True)
    assert files_of(gradient_settings["out"]) == files_of(tmp_path / "undisturbed")


def test_a_cache_without_gradients_is_refused_before_anything_is_written(gradient_settings, settings):
    with pytest.raises(UserError, match=r"has no gradients at imported; .* --gradients"):
        train(**{**gradient_settings, "cache": settings["cache"]})
    assert not settings["out"].exists()


def test_gradients_in_the_cache_do_not_change_other_architectures(
    settings, gradient_settings, gradient_cache, tmp_path
):
    alone = train(**{**settings, "cache": gradient_cache.path})
    beside = {**gradient_settings, "out": tmp_path / "both"}
    del beside["sae"]
    runs = sweep({"sae": ["topk", "gradient"]}, **{k: v for k, v in beside.items() if k != "beta"})
    weights = [(run.path / "sae.safetensors").read_bytes() for run in (alone, *runs)]
    assert weights[0] == weights[1] != weights[2]
