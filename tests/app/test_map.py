from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from saebench.analysis.geometry import decoder_map
from saebench.store.query import open_store
from saebench_app.page.map import _features
from saebench_app.work import Task, found
from tests.app.conftest import column, finish, shown
from tests.app.two_saes import build_two
from tests.store.small_store import small_sae

Visit = Callable[..., AppTest]


def test_a_map_is_drawn_once_and_kept(visit: Visit, two: Path, own_cache: Path) -> None:
    app = visit(two, "map")
    assert not app.exception
    assert shown(app, "empty") is not None
    app = finish(app.button(key="start-map").click().run())
    assert not app.exception
    assert shown(app, "empty") is None
    with open_store(two) as store:
        result = found(Task("map", {}, (store.info()["sae_hash"], "pca")))
    assert result is not None
    assert result.tables["points"].equals(decoder_map(small_sae(0), "pca", n_clusters=8))
    other = visit(two, "map", method="pca", color="density")
    assert not other.exception
    assert shown(other, "empty") is None
    assert shown(visit(two, "map", sae="other"), "empty") is not None


def test_a_selection_of_the_url_is_listed(visit: Visit, two: Path, own_cache: Path) -> None:
    app = visit(two, "map", among="3,1,17")
    with open_store(two) as store:
        expected = store.features(among=[1, 3, 17], order_by="density", descending=True)
    assert column(app, "feature", "selected") == expected["feature"].tolist()
    assert column(app, "density", "selected") == expected["density"].tolist()
    next(button for button in app.button if button.label == "Clear").click().run()
    assert shown(app, "selected") is None
    assert column(visit(two, "features", among="3,1,17"), "feature") == [1, 3, 17]


@pytest.mark.parametrize(
    ("points", "listed"),
    [
        ([{"customdata": [3]}, {"customdata": 1}, {"customdata": 3}], [1, 3]),
        ([{"customdata": "x"}, {}, {"customdata": None}, {"customdata": [[1]]}], []),
        ([{"customdata": [99]}, {"customdata": -1}, {"customdata": 2.5}], []),
    ],
)
def test_only_features_of_the_map_are_selected(points: list[dict[str, object]], listed: list[int]) -> None:
    state = {"selection": {"points": points}}
    assert _features(state, decoder_map(small_sae(0), n_clusters=2)) == listed


def test_a_map_without_its_run_says_what_to_do(visit: Visit, tmp_path: Path, own_cache: Path) -> None:
    app = visit(build_two(tmp_path, runs=False), "map", method="umap", color="nonsense")
    assert not app.exception
    notice = shown(app, "no-run")
    assert notice is not None
    assert "--run" in notice["text"]
