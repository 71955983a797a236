"""Every page opens a store whose units are not texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from streamlit.testing.v1 import AppTest
from torch import nn

import saebench as sb
from tests.app.conftest import column, shown

Visit = Callable[..., AppTest]


@pytest.fixture(scope="module", params=[7, 1], ids=["positions", "vectors"])
def units(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("units")
    torch.manual_seed(0)
    shape = (50, 7, 6) if request.param > 1 else (350, 6)
    source = sb.ModuleSource(
        nn.Sequential(nn.Linear(6, 16), nn.ReLU()),
        sites=["0"],
        batches=[torch.randn(shape) for _ in range(4)],
        columns=lambda batch: {"label": range(len(batch))},
    )
    cache = sb.harvest(source=source, out=folder / "cache", quiet=True)
    run = sb.train(
        cache=cache, out=folder / "runs" / "a", d_sae=24, k=3, tokens=5_000, batch_size=100, quiet=True
    )
    sb.index(run=run, cache=cache, out=folder / "store", name="a", quiet=True).close()
    return folder / "store"


@pytest.mark.parametrize(
    "page",
    ["store", "features", "feature", "context", "token", "map", "lists", "compare", "explain", "train", "sql",
     "prompt", "steer"],
)  # fmt: skip
def test_page_of_a_store_of_units_opens_without_an_error(visit: Visit, units: Path, page: str) -> None:
    app = visit(units, page)
    assert not app.exception
    assert shown(app, "error") is None


def test_feature_page_shows_units_with_their_columns(visit: Visit, units: Path) -> None:
    with sb.open_store(units) as store:
        feature = int(store.features(order_by="n_act", descending=True)["feature"][0])
        expected = store.examples(feature, "top")
    picture = shown(visit(units, "feature", f=feature), "examples")
    assert picture is not None
    assert len(picture["examples"]) == len(expected)
    for one, row in zip(picture["examples"], expected.to_dict("records"), strict=True):
        assert one["exact"] == row["value"] and one["source"] == row["label"]
        assert one["spans"][0][0].startswith(f"unit {row['ctx']}")
        assert f"c={row['ctx']}" in one["href"]


def test_context_page_shows_a_unit_and_what_fires_at_a_position(visit: Visit, units: Path) -> None:
    with sb.open_store(units) as store:
        one = store.examples(0).iloc[0]
        fires = store.firing_at(int(one["ctx"]), int(one["pos"]))
    app = visit(units, "context", c=one["ctx"], pos=one["pos"], f1=0)
    assert not app.exception
    assert app.title[0].value == f"Unit {one['ctx']}"
    text = shown(app, "context-text")
    assert text is not None and text["spans"][0][0].startswith(f"unit {one['ctx']}")
    app.button[-1].click().run()
    assert column(app, "feature", "fires") == fires["feature"].tolist()
