"""What the pages say about both sides of transcoders and crosscoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from saebench.store.query import open_store
from saebench_app.sites import reads, writes
from tests.app.conftest import column, shown, url
from tests.store.two_sided import (
    FIRST,
    FIRST_ONLY,
    LAST,
    LAST_ONLY,
    NOTHING,
    READ,
    WRITTEN,
    TwoSided,
    build_two_sided,
)

Visit = Callable[..., AppTest]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_text: Path) -> TwoSided:
    return build_two_sided(tmp_path_factory.mktemp("sides"), tiny_model_folder, tiny_text)


def tiles(app: AppTest, key: str) -> dict[str, Any]:
    data = shown(app, key)
    assert data is not None
    return {tile["name"]: tile for tile in data["tiles"]}


def test_a_feature_of_a_transcoder_names_what_is_read_and_written(visit: Visit, both: TwoSided) -> None:
    app = visit(both.store, "feature", sae="transcoder", f=3)
    assert not app.exception
    found = tiles(app, "statistics")
    assert (found["Reads"]["value"], found["Writes"]["value"]) == (READ.name, WRITTEN.name)
    assert "Enc-dec cosine" not in found and shown(app, "sites") is None
    overview = visit(both.store, "store", sae="transcoder")
    assert tiles(overview, "extent")["Writes"]["value"] == WRITTEN.name
    assert f"{READ.name} → {WRITTEN.name}" in column(overview, "site", "saes")
    for name in ("transcoder", "crosscoder"):
        pills = visit(both.store, "features", sae=name).get("button_group")[0].proto
        assert ("exclusive" in str(pills)) == (name == "crosscoder")


@pytest.mark.parametrize("feature", [5, FIRST_ONLY, NOTHING])
def test_a_feature_of_a_crosscoder_has_its_norm_at_each_site(
    visit: Visit, both: TwoSided, feature: int
) -> None:
    app = visit(both.store, "feature", sae="crosscoder", f=feature)
    assert not app.exception
    with open_store(both.store, "crosscoder") as store:
        sites = store.site_norms(feature)
    assert column(app, "site", "sites") == [FIRST.name, LAST.name]
    assert column(app, "norm", "sites") == pytest.approx(sites["norm"].tolist())
    if feature == NOTHING:
        assert tiles(app, "statistics")["Sites"]["value"] == "none"
    else:
        assert column(app, "share", "sites") == pytest.approx(sites["share"].tolist())
    if feature == FIRST_ONLY:
        assert tiles(app, "statistics")["Sites"]["value"] == "exclusive"


def test_compare_shows_shared_and_exclusive_features_of_a_crosscoder(visit: Visit, both: TwoSided) -> None:
    app = visit(both.store, "compare", sae="crosscoder")
    assert not app.exception
    with open_store(both.store, "crosscoder") as store:
        alive = store.features(flags={"dead": False})
    found = tiles(app, "site-counts")
    for at, site in enumerate((FIRST, LAST)):
        own = alive[alive["exclusive"].astype(bool) & (alive["main_site"] == site.name)]
        assert found[f"Only {site.name}"]["exact"] == len(own)
        if len(own):
            assert sorted(column(app, "feature", f"only-{at}")) == own["feature"].tolist()
    written = alive["main_site"].notna().sum()
    assert found["Shared"]["exact"] == written - alive["exclusive"].sum()
    bars = shown(app, "norm-shares")
    assert bars is not None and sum(bar["size"] for bar in bars["bars"]) == written
    [link] = [bar["href"] for bar in bars["bars"][-1:] if bar["size"]] or [""]
    if link:
        assert "norm=0.95..1" in link.replace("%2E", ".") and link.startswith("features?")
    assert shown(visit(both.store, "compare", sae="transcoder"), "norm-shares") is None


def test_features_are_filtered_and_sorted_by_their_sites(visit: Visit, both: TwoSided) -> None:
    app = visit(both.store, "features", sae="crosscoder", exclusive="only", norm="0.7..1", sort="norm_share")
    assert not app.exception
    listed = column(app, "feature")
    assert LAST_ONLY in listed and FIRST_ONLY not in listed
    shares = column(app, "norm share")
    assert shares == sorted(shares) and min(shares) > 0.7
    assert set(column(app, "main site")) == {LAST.name}
    assert url(app)["norm"] == "0.7..1"


def test_sites_of_two_models_are_named_with_their_models() -> None:
    sites = [{"name": "0:mlp", "width": 3}, {"name": "1:mlp", "width": 3}]
    info = {"sites": sites, "targets": sites[1:], "models": ["<b>a</b>", "b"]}
    assert reads(info) == "mlp of <b>a</b>, mlp of b" and writes(info) == "mlp of b"
    one = [{"name": "0:mlp", "width": 3}]
    assert reads({"sites": one, "targets": one}) == "0:mlp"
