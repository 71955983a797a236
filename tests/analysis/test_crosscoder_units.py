"""Decoder rows of crosscoders are compared in units in which all sites vary alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import saebench as sb


def test_the_units_of_a_site_do_not_change_what_is_similar(tmp_path, capsys) -> None:
    rows = np.random.default_rng(0).normal(size=(2000, 8)).astype("f4")
    other = (rows @ np.random.default_rng(1).normal(size=(8, 8))).astype("f4")
    found = []
    for factor in (1.0, 1000.0):
        place = tmp_path / str(factor)
        place.mkdir()
        np.save(place / "a.npy", rows)
        np.save(place / "b.npy", other * factor)
        cache = sb.import_activations(
            source=place / "a.npy", also=(place / "b.npy",), hook=("a", "b"), out=place / "cache",
            dtype="fp32", quiet=True,
        )  # fmt: skip
        settings = {"d_sae": 24, "k": 4, "tokens": 4000, "batch_size": 200, "quiet": True, "device": "cpu"}
        runs = [
            sb.train(cache, out=place / f"run{seed}", crosscoder=True, seed=seed, order_seed=0, **settings)
            for seed in (0, 1)
        ]
        capsys.readouterr()
        matching = sb.match(runs[0], runs[1], quiet=True)
        assert "warning" not in capsys.readouterr().err
        found.append((matching.mean_similarity, sb.redundancy(runs[0]).effective_rank))
        sb.match(runs[0].sae, runs[1].sae, quiet=True)
        assert "units of its sites" in capsys.readouterr().err
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert torch.isfinite(torch.tensor(found)).all()
