"""The feature store benchmark at a small size: a valid store, and a consistent report."""

import contextlib
import io
import json

import numpy as np
import pytest

from saebench.bench import store
from saebench.bench.settings import BenchConfig
from saebench.bench.store_world import MadeUpCache, made_up_codes
from saebench.cli import main
from saebench.store import check_store

SMALL = {"store": True, "store_activations": 40_000, "store_features": 256, "k": 8, "d_in": 16, "threads": 1}


def test_synthetic_codes_have_k_latents_per_token_and_few_dense_ones():
    cache = MadeUpCache(10_000, 8)
    counts = np.zeros(256, dtype=int)
    for latent, row, value in made_up_codes(cache, 256, 8):
        assert (value > 0).all()
        assert len(np.unique(row * 256 + latent)) > 0.999 * len(row)
        counts += np.bincount(latent, minlength=256)
    assert counts.sum() == 8 * cache.n_rows
    assert counts.max() > 3 * np.median(counts)


def test_measured_store_passes_check(tmp_path):
    timer, n_activations, n_tokens = store.build(tmp_path / "store", BenchConfig(**SMALL), lambda what: None)
    assert check_store(tmp_path / "store") == []
    assert 0.999 < n_activations / (8 * n_tokens) <= 1
    assert set(store.FIRST_TABLES) <= set(timer.seconds)
    sizes = store.bytes_of_tables(tmp_path / "store")
    written = sum(file.stat().st_size for file in (tmp_path / "store").rglob("*.duckdb"))
    assert 0.3 * written < sum(sizes.values()) <= 1.5 * written


@pytest.fixture
def printed(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "LARGE", 5000)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name != "store"]
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert main(["bench", "--store", "--quiet", "--out", str(tmp_path / "bench.json"), *words]) == 0
    return text.getvalue(), json.loads((tmp_path / "bench.json").read_text())


def test_report_has_goals_and_is_printed(printed):
    text, report = printed
    for one in report["measured"]:
        assert one["name"] in text
        assert one["value"] > 0
        assert one["met"] == (None if one["goal"] is None else one["value"] <= one["goal"])
    goals = [one["goal"] for one in report["measured"] if one["goal"] is not None]
    assert goals == [90, 300, 8, 16, 15, 50, 15, 50, 50, 3]
    assert {one["name"] for one in report["extrapolated"]} >= {"all tables built", "store on disk"}
    assert report["reasoning"] in text
