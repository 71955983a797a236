from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from saebench.analysis.matching import match
from saebench.store.query import open_store
from tests.app.conftest import column, finish, shown, url
from tests.app.two_saes import build_two
from tests.store.small_store import small_sae

Visit = Callable[..., AppTest]


def test_two_saes_are_shown_side_by_side(visit: Visit, two: Path, own_cache: Path) -> None:
    app = visit(two, "compare")
    assert not app.exception
    with open_store(two) as store:
        both = store.compare().set_index("name")
    assert column(app, "measure", "side-by-side")[:2] == ["architecture", "features"]
    for name in ("small", "other"):
        shown_numbers = column(app, name, "side-by-side")
        assert shown_numbers[1] == both["d_sae"][name]
        assert shown_numbers[3] == both["l0"][name]
        assert shown_numbers[7] == both["explained_variance"][name]


def test_features_are_matched_as_the_library_does(visit: Visit, two: Path, own_cache: Path) -> None:
    app = visit(two, "compare", a="small", b="other")
    app = finish(app.button(key="start-match").click().run())
    assert not app.exception
    expected = match(small_sae(0), small_sae(1), quiet=True)
    tiles = shown(app, "matching")
    assert tiles is not None
    exact = {tile["name"]: tile["exact"] for tile in tiles["tiles"]}
    assert exact["Mean similarity"] == pytest.approx(expected.mean_similarity)
    assert exact["Stability"] == expected.stability
    pairs = expected.pairs
    assert column(app, "similarity", "pairs") == pytest.approx(pairs["similarity"].tolist())
    assert column(app, "other", "pairs") == pairs["feature_b"].tolist()
    data = shown(app, "pairs")
    assert data is not None
    fa, fb = int(pairs["feature_a"][0]), int(pairs["feature_b"][0])
    wanted = f"compare?sae=small&a=small&b=other&fa={fa}&fb={fb}"
    assert data["rows"][0][0]["href"] == wanted
    assert data["headings"][1]["href"] == "compare?sae=small&a=small&b=other&rank=a"
    again = visit(two, "compare", a="small", b="other", rank="a")
    assert column(again, "small", "pairs") == sorted(pairs["feature_a"].tolist())
    assert shown(again, "pairs")["headings"][1]["sorted"] == "ascending"  # type: ignore[index]
    turned = visit(two, "compare", a="small", b="other", turned=1)
    assert column(turned, "similarity", "pairs") == pytest.approx(pairs["similarity"].tolist()[::-1])


def test_saes_that_cannot_be_matched_give_the_reason(visit: Visit, two: Path, own_cache: Path) -> None:
    app = visit(two, "compare", a="small", b="other", by="activation")
    app = finish(app.button(key="start-match").click().run())
    assert not app.exception
    why = shown(app, "failed-match")
    assert why is not None
    assert why["kind"] == "error"
    assert why["text"].count(".") >= 1


@pytest.mark.parametrize("feature", [0, 3, 22])
def test_a_counterpart_is_found_without_runs(
    visit: Visit, tmp_path_factory: pytest.TempPathFactory, two: Path, own_cache: Path, feature: int
) -> None:
    app = visit(two, "compare", a="small", b="other", fa=feature)
    assert not app.exception
    with open_store(two, "small") as store, open_store(two, "other") as other:
        firing = store.same_firings(feature, "other", limit=8)
        if firing.empty:
            assert shown(app, "none-b") is not None
            return
        best = int(firing["feature"].iloc[0])
        examples = other.examples(best, "top")["value"].tolist()
    assert column(app, "feature", "firings-a") == firing["feature"].tolist()
    assert column(app, "Jaccard", "firings-a") == firing["jaccard"].tolist()
    assert app.number_input(key="fb").value == best
    picture = shown(app, "examples-b")
    assert picture is not None
    assert [one["exact"] for one in picture["examples"]] == examples[:5]
    app.number_input(key="fb").set_value(5).run()
    assert url(app) == {"sae": "small", "a": "small", "b": "other", "fa": str(feature), "fb": "5"}


def test_without_runs_or_a_second_sae_the_page_says_what_to_do(
    visit: Visit, small_store: Path, tmp_path: Path, own_cache: Path
) -> None:
    alone = shown(visit(small_store, "compare"), "empty")
    assert alone is not None
    assert "saebench index" in alone["text"]
    without = visit(build_two(tmp_path, runs=False), "compare")
    notice = shown(without, "no-run")
    assert notice is not None
    assert "--run" in notice["text"]
    assert without.number_input(key="fa")


def test_swap_exchanges_the_saes_and_unknown_names_give_an_error(
    visit: Visit, two: Path, own_cache: Path
) -> None:
    app = visit(two, "compare", a="small", b="other", fa=1, fb=2)
    next(button for button in app.button if button.label == "Swap").click().run()
    assert url(app) == {"sae": "small", "a": "other", "b": "small", "fa": "2", "fb": "1"}
    error = shown(visit(two, "compare", a="<b>x"), "error")
    assert error is not None
    assert "'<b>x' is not an SAE of this store" in error["text"]
    error = shown(visit(two, "compare", a="small", fa=99), "error")
    assert error is not None
    assert "feature 99 is not in 'small'" in error["text"]
    assert shown(visit(two, "compare", a="small", b="small"), "same") is not None
