"""Stores of units that are not texts: modules of three kinds are harvested, trained on, indexed and read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import saebench as sb
from saebench.store import check_store, rebuild_store
from saebench.store.query import FeatureStore


def vit() -> tuple[nn.Module, str, list[Any]]:
    """A vision transformer of random weights: 17 positions of an image of 16 x 16 pixels."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16,
        patch_size=4, num_channels=1,
    )  # fmt: skip
    return ViTModel(config), "layers.1.mlp", [{"pixel_values": torch.randn(20, 1, 16, 16)} for _ in range(6)]


def lstm() -> tuple[nn.Module, str, list[Any]]:
    return nn.LSTM(6, 16, batch_first=True), ":0", [torch.randn(20, 9, 6) for _ in range(6)]


def mlp() -> tuple[nn.Module, str, list[Any]]:
    class Ours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Sequential(nn.Linear(6, 16), nn.GELU())
            self.last = nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.inside(x))

    return Ours(), "inside", [torch.randn(200, 6) for _ in range(6)]


@pytest.fixture(scope="module", params=[vit, lstm, mlp], ids=lambda make: make.__name__)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[sb.ActivationCache, Path, Path]:
    """Cache, run and store."""
    torch.manual_seed(0)
    module, site, batches = request.param()
    source = sb.ModuleSource(module, [site], batches, columns=columns_of)
    folder = tmp_path_factory.mktemp("units")
    cache = sb.harvest(source=source, out=folder / "cache", dtype="fp32", quiet=True)
    run = sb.train(
        cache=cache,
        out=folder / "run",
        d_sae=32,
        k=4,
        tokens=20_000,
        batch_size=256,
        device="cpu",
        quiet=True,
    )
    sb.index(run=run, cache=cache, out=folder / "store", name="units", quiet=True).close()
    return cache, run.path, folder / "store"


def columns_of(batch: Any) -> dict[str, Any]:
    (x,) = batch.values() if isinstance(batch, dict) else [batch]
    return {"label": range(len(x)), "mean": x.flatten(1).mean(1)}


@pytest.fixture
def store(made: tuple[sb.ActivationCache, Path, Path]) -> Any:
    with sb.open_store(made[2]) as opened:
        yield opened


def test_run_on_units_is_evaluated_on_held_out_units(made: tuple[sb.ActivationCache, Path, Path]) -> None:
    cache, run, _ = made
    report = sb.evaluate(run=run, tokens=1000, quiet=True)
    assert report.n_tokens == min(1000, int(cache.held_out.sum())) and report.explained_variance > 0
    with pytest.raises(sb.UserError, match="without tokens"):
        sb.evaluate(run=run, model="demo", quiet=True)


def test_activations_are_at_the_units_and_positions_of_the_rows(
    made: tuple[sb.ActivationCache, Path, Path], store: FeatureStore
) -> None:
    cache, run, _ = made
    codes = sb.load(run).encode(cache.activations()).to_dense().detach()
    info = store.info()
    assert info["modality"] == "unit" and info["n_contexts"] == cache.n_contexts
    assert info["n_tokens"] == cache.n_rows and info["n_documents"] == 0
    feature = int(codes.count_nonzero(0).argmax())
    found = store.activations(feature)
    rows = codes[:, feature].nonzero()[:, 0]
    assert found["ctx"].tolist() == cache.unit[rows].tolist()
    assert found["pos"].tolist() == cache.pos[rows].tolist()
    np.testing.assert_allclose(found["value"], codes[rows, feature], rtol=1e-5)
    row = store.feature(feature)
    assert row["n_ctx_act"] == len(set(found["ctx"]))
    assert row["mean_pos"] == pytest.approx(found["pos"].mean())
    assert store.has("position") == (cache.unit_len.max() > 1)


def test_examples_show_units_with_their_columns_and_activations(
    made: tuple[sb.ActivationCache, Path, Path], store: FeatureStore
) -> None:
    cache, run, _ = made
    codes = sb.load(run).encode(cache.activations()).to_dense().detach()
    feature = int(codes.count_nonzero(0).argmax())
    n_positions = int(cache.unit_len[0])
    for frame in (store.examples(feature), store.examples_between(feature, 0, 1e9, n=5)):
        for one in frame.to_dict("records"):
            unit = one["ctx"]
            expected = codes.view(-1, n_positions, 32)[unit, :, feature]
            assert one["acts"] == pytest.approx(expected.tolist(), rel=1e-5)
            assert one["acts"][one["pos"] - one["start"]] == pytest.approx(one["value"])
            text = "".join(one["pieces"])
            assert text == f"unit {unit}" if n_positions == 1 else text.startswith(f"unit {unit}: 0 1 2")
            label, mean = (column[unit].item() for column in cache.unit_columns().values())
            assert one["label"] == f"label={label:g}, mean={mean:g}"
            assert one["tokens"] == []
    unit = store.context(3)
    assert unit["n_tokens"] == n_positions and len(unit["pieces"]) == n_positions
    assert set(store.context_features(3)["pos"]) <= set(range(n_positions))
    with pytest.raises(sb.UserError, match="its modality is unit"):
        store.tokens(feature)


def test_store_of_units_is_intact_and_can_be_rebuilt(
    made: tuple[sb.ActivationCache, Path, Path], tmp_path: Path
) -> None:
    cache, run, path = made
    assert check_store(path, run=run, cache=cache, quiet=True) == []
    copied = Path(shutil.copytree(path, tmp_path / "store"))
    with sb.open_store(copied) as store:
        before = store.examples(1), store.features()
    rebuild_store(copied, quiet=True)
    assert check_store(copied, run=run, cache=cache, quiet=True) == []
    with sb.open_store(copied) as store:
        assert store.examples(1).equals(before[0]) and store.features().equals(before[1])


def test_examples_of_an_array_name_the_row(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(500, 8)).astype("f4"))
    cache = sb.import_activations(source=tmp_path / "x.npy", out=tmp_path / "cache", quiet=True)
    run = sb.train(cache=cache, out=tmp_path / "run", d_sae=16, k=2, tokens=4000, batch_size=100, quiet=True)
    with sb.index(run=run, cache=cache, out=tmp_path / "store", quiet=True) as store:
        one = store.examples(int(store.features()["n_act"].argmax()), "top").iloc[0]
        assert one["pieces"] == [f"unit {one['ctx']}"] and one["acts"] == [one["value"]]
