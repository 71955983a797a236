from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from saebench.core.formatting import number, share
from saebench.store.query import open_store
from tests.app.conftest import column, shown, url

Visit = Callable[..., AppTest]


def test_the_table_lists_every_feature(visit: Visit, small_store: Path) -> None:
    app = visit(small_store, "features")
    assert not app.exception
    with open_store(small_store) as store:
        features = store.features()
    assert column(app, "feature") == features["feature"].tolist()
    assert column(app, "density") == features["density"].tolist()


@pytest.mark.parametrize("label", ["density", "max act", "top-token share", "max cosine"])
def test_a_heading_links_to_the_table_sorted_by_it(visit: Visit, small_store: Path, label: str) -> None:
    from saebench_app.page.features.columns import COLUMNS

    name = next(c.name for c in COLUMNS if c.label == label)
    app = visit(small_store, "features", sort=name, desc=1)
    with open_store(small_store) as store:
        expected = store.features(order_by=name, descending=True)["feature"].tolist()
    assert column(app, "feature") == expected
    data = shown(app, "features")
    assert data is not None
    heading = next(h for h in data["headings"] if h["label"] == label)
    assert heading["sorted"] == "descending"
    assert heading["href"] == f"features?sae=small&sort={name}"


def test_the_url_filters_and_the_controls_show_it(visit: Visit, small_store: Path) -> None:
    app = visit(small_store, "features", q="a", density="-1.5..", max="..9", dead="hide", dense="hide")
    with open_store(small_store) as store:
        expected = store.features(
            ranges={"density": (10**-1.5, None), "max_act": (None, 9)},
            flags={"dead": False, "dense": False},
            text="a",
        )
    assert column(app, "feature") == expected["feature"].tolist() != []
    assert app.text_input(key="text").value == "a"
    assert app.slider(key="log_density").value == (-1.5, 0.0)
    assert app.slider(key="max_act").value[1] == 9


def test_a_control_writes_the_url(visit: Visit, small_store: Path) -> None:
    app = visit(small_store, "features", sort="density", desc=1)
    app.slider(key="log_density").set_value((-1.5, 0.0)).run()
    assert url(app) == {"sae": "small", "sort": "density", "desc": "1", "density": "-1.5.."}
    assert min(column(app, "density")) >= 10**-1.5
    app.text_input(key="text").set_value("OF").run()
    assert url(app)["q"] == "OF"
    app.slider(key="log_density").set_value((-2.0, 0.0)).run()
    assert "density" not in url(app)


def test_nothing_found_says_what_to_do(visit: Visit, small_store: Path) -> None:
    app = visit(small_store, "features", q="no such token")
    notice = shown(app, "none")
    assert notice is not None
    assert "clear" in notice["text"]
    app.button[0].click().run()
    assert url(app) == {"sae": "small"}
    assert len(column(app, "feature")) == 24


def test_a_feature_page_shows_the_numbers_of_the_store(visit: Visit, small_store: Path) -> None:
    app = visit(small_store, "feature", f=3)
    assert not app.exception
    assert app.title[0].value == "Feature 3"
    with open_store(small_store) as store:
        row, tokens, near, logits = store.feature(3), store.tokens(3), store.neighbors(3), store.logits(3)
        examples = store.examples(3, group="top")
    data = shown(app, "statistics")
    assert data is not None
    tiles = {tile["name"]: tile for tile in data["tiles"]}
    density, largest = tiles["Activation density"], tiles["Max activation"]
    assert (density["exact"], density["value"]) == (row["density"], share(row["density"]))
    assert (largest["exact"], largest["value"]) == (row["max_act"], number(row["max_act"]))
    assert tiles["Active tokens"]["exact"] == row["n_act"]
    assert column(app, "P(token|fires)", "tokens") == tokens["p_token_given_fire"].tolist()
    assert column(app, "P(fires|token)", "tokens") == tokens["p_fire_given_token"].tolist()
    assert column(app, "feature", "neighbors") == near["other"].head(10).tolist()
    assert column(app, "logit", "logits") == logits[logits["sign"] == 1]["value"].tolist()
    picture = shown(app, "examples")
    assert picture is not None
    assert [one["exact"] for one in picture["examples"]] == examples["value"].tolist()


@pytest.mark.parametrize("window", [8, 16, 0])
def test_an_example_is_cut_around_its_token(visit: Visit, small_store: Path, window: int) -> None:
    app = visit(small_store, "feature", f=0, window=window)
    with open_store(small_store) as store:
        rows = store.examples(0, group="top").to_dict("records")
    data = shown(app, "examples")
    assert data is not None
    for one, row in zip(data["examples"], rows, strict=True):
        spans = one["spans"]
        assert spans[one["peak"]][2] == number(row["value"])
        assert len(spans) == len(row["pieces"]) if window == 0 else len(spans) <= 2 * window + 1
        assert one["after"] == (row["pos"] - row["start"] + window + 1 < len(row["pieces"]) and window > 0)


def test_stepping_stays_in_the_filtered_sorted_list(visit: Visit, small_store: Path) -> None:
    with open_store(small_store) as store:
        listed = store.features(flags={"dead": False}, order_by="max_act", descending=True)[
            "feature"
        ].tolist()
    app = visit(small_store, "feature", f=listed[0], sort="max_act", desc=1, dead="hide")
    assert app.button(key="Previous").disabled
    for expected in listed[1:4]:
        app.button(key="Next").click().run()
        assert app.title[0].value == f"Feature {expected}"
    app.button(key="Previous").click().run()
    assert url(app) == {"sae": "small", "sort": "max_act", "desc": "1", "dead": "hide", "f": str(listed[2])}


def test_other_examples_and_another_feature(visit: Visit, small_store: Path) -> None:
    app = visit(small_store, "feature", f=1, group="random")
    with open_store(small_store) as store:
        expected = store.examples(1, group="random")["value"].tolist()
    data = shown(app, "examples")
    assert data is not None
    assert [one["exact"] for one in data["examples"]] == expected
    app.number_input(key="goto").set_value(7).run()
    assert url(app) == {"sae": "small", "group": "random", "f": "7"}


def test_a_dead_feature_says_so(visit: Visit, small_store: Path) -> None:
    app = visit(small_store, "feature", f=23)
    assert not app.exception
    notice = shown(app, "no-examples")
    assert notice is not None
    assert "fires on no token" in notice["text"]
    assert shown(app, "neighbors") is not None


@pytest.mark.parametrize("page", ["store", "features", "feature"])
def test_a_store_without_text_says_what_it_lacks(visit: Visit, textless_store: Path, page: str) -> None:
    app = visit(textless_store, page, f=1)
    assert not app.exception
    if page == "features":
        data = shown(app, "features")
        assert data is not None
        assert "top token" not in [heading["label"] for heading in data["headings"]]
    else:
        notice = shown(app, "no-tokens" if page == "feature" else "missing0")
        assert notice is not None
        assert "imported without tokens" in notice["text"]


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ({"f": 99}, "feature 99 is not in 'small'; it has 0 to 23"),
        ({"sae": "<b>x</b>"}, "'<b>x</b>' is not an SAE"),
    ],
)
def test_an_invalid_url_gives_an_error(
    visit: Visit, small_store: Path, query: dict[str, object], sentence: str
) -> None:
    app = visit(small_store, "feature", **query)
    notice = shown(app, "error")
    assert not app.exception
    assert notice is not None
    assert sentence in notice["text"]


def test_the_store_page_lists_the_saes(visit: Visit, small_store: Path) -> None:
    app = visit(small_store)
    assert column(app, "name", "saes") == ["small"]
    assert column(app, "explained variance", "saes") == [0.5]
    assert math.isclose(column(app, "dead", "saes")[0], open_store(small_store).info()["n_dead"] / 24)


def test_a_new_generation_is_offered_and_a_deleted_store_gives_an_error(
    visit: Visit, small_store: Path, tmp_path: Path
) -> None:
    from saebench.core.files import write_json_atomic
    from saebench.store.publish import read_manifest

    store = tmp_path / "store"
    shutil.copytree(small_store, store)
    app = visit(store, "features")
    assert not app.sidebar.button
    newer = read_manifest(store).to_json() | {"generation": 2}
    write_json_atomic(store / "manifest.json", newer)
    app.run()
    assert app.sidebar.button[0].label == "Show generation 2"
    app.sidebar.button[0].click().run()
    assert not app.exception
    assert app.session_state["generation"] == 2
    shutil.rmtree(store)
    app.run()
    assert not app.exception
    notice = shown(app, "gone")
    assert notice is not None
    assert "not a feature store" in notice["text"]
