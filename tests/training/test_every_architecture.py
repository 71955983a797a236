"""Whole trainings of every registered architecture: repetition, resume, mean L0, sweeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saebench.saes.registry import ARCHITECTURES
from saebench.training import sweep, train

FIXED = ("topk", "gradient", "matching-pursuit")
"""Architectures in which k bounds the L0 of every token."""
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@pytest.fixture(scope="session")
def cache_with_gradients(make_cache, sparse_rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    gradients_ND = 0.01 * torch.randn(sparse_rows.shape, generator=torch.Generator().manual_seed(1))
    np.save(folder / "g.npy", gradients_ND.numpy())
    return make_cache(folder / "sparse", sparse_rows, gradients=folder / "g.npy")


@pytest.fixture
def all_settings(settings, cache_with_gradients):
    return {**settings, "cache": cache_with_gradients.path}


@every_architecture
def test_two_runs_with_one_seed_and_one_that_was_interrupted_end_with_the_same_bytes(
    name, all_settings, tmp_path, files_of, stop_after
):
    first = train(**all_settings, sae=name)
    second = train(**all_settings | {"out": tmp_path / "second"}, sae=name)
    assert files_of(first.path) == files_of(second.path)

    again = all_settings | {"out": tmp_path / "again"}
    with stop_after(37, KeyboardInterrupt()):
        train(**again, sae=name)
    train(**again, sae=name, resume=True)
    assert files_of(tmp_path / "again") == files_of(first.path)


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n not in FIXED])
def test_mean_l0_at_inference_is_k_on_rows_of_neither_training_nor_calibration(
    name, all_settings, sparse_rows_of
):
    run = train(**all_settings | {"tokens": 400 * 128, "d_sae": 32, "log_every": 100}, sae=name)
    l0 = run.sae.encode(sparse_rows_of(seed=7)).l0().double().mean()
    assert abs(l0 - 4) <= 0.05 * 4


def test_one_sweep_of_all_architectures_gives_the_bytes_of_single_trainings(all_settings, tmp_path, files_of):
    runs = sweep({"sae": list(ARCHITECTURES)}, **all_settings | {"out": tmp_path / "runs"})
    assert [run.path.name for run in runs] == list(ARCHITECTURES)
    for run in runs:
        alone = train(**all_settings | {"out": tmp_path / run.path.name}, sae=run.path.name)
        assert files_of(alone.path) == files_of(run.path)


@pytest.mark.parametrize(("name", "k"), [("relu", 64), ("gated", 60), ("jumprelu", 60)])
def test_mean_l0_out_of_reach_is_warned_about_once(name, k, all_settings, sparse_rows, tmp_path, capsys):
    out = tmp_path / "within"
    train(**all_settings | {"out": out}, sae=name)
    assert capsys.readouterr().err == ""
    run = train(**all_settings | {"k": k}, sae=name)
    (warning,) = capsys.readouterr().err.splitlines()
    l0 = run.sae.encode(sparse_rows[-300:]).l0().float().mean().item()
    assert warning.startswith(f"warning: {run.path} has a mean L0 of ")
    assert f"the target is k = {k}: thresholds cannot reach it" in warning
    assert abs(float(warning.split(" L0 of ")[1].split(",")[0]) - l0) < 0.1 and l0 < 0.95 * k
