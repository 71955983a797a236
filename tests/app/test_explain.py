from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

import saebench
from saebench.store.query import open_store
from tests.app.conftest import column, finish, shown
from tests.store.small_store import SmallCache, build_store, small_options, small_sae

Visit = Callable[..., AppTest]


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which some features, but not all, fire often enough to be explained."""
    store = tmp_path_factory.mktemp("explained") / "store"
    build_store(store, small_sae(), SmallCache(n_contexts=60), small_options(), no_logits="not needed")
    saebench.explain(store, quiet=True).close()
    return store


def test_the_explain_page_shows_the_numbers_of_the_store(visit: Visit, explained: Path) -> None:
    app = visit(explained, "explain")
    assert not app.exception
    with open_store(explained) as store:
        listed = store.all_explanations("rules")
        scores = store.all_explanation_scores("rules")
        outcomes = store.explanation_outcomes("rules")
        by_feature = {f: store.explanations(f).to_dict("records") for f in listed["feature"]}
    for row in listed.to_dict("records"):
        [one] = by_feature[row["feature"]]
        assert (row["status"], row["n_test"]) == (one["status"], one["n_test"])
        if row["status"] == "ok":
            assert (row["text"], row["score"]) == (one["text"], one["score"])
    known = listed["score"].dropna()
    assert known.is_monotonic_decreasing
    assert listed["score"].isna().tolist() == sorted(listed["score"].isna())
    assert column(app, "feature", "explanations") == listed["feature"].tolist()
    assert [v for v in column(app, "score", "explanations") if v is not None] == known.tolist()
    tiles = shown(app, "explained")
    assert tiles is not None
    exact = {tile["name"]: tile["exact"] for tile in tiles["tiles"]}
    assert exact["Explained"] == (listed["status"] == "ok").sum()
    means = scores.groupby("scorer")["value"].mean()
    assert exact["Mean score"] == pytest.approx(means["rule"])
    assert exact["Shuffled"] == pytest.approx(means["shuffled"])
    assert column(app, "features", "outcomes") == outcomes["n"].tolist()
    assert outcomes["n"].sum() == len(listed)


def test_the_url_sorts_the_explanations(visit: Visit, explained: Path) -> None:
    app = visit(explained, "explain", by="feature", up=1)
    assert column(app, "feature", "explanations") == sorted(column(app, "feature", "explanations"))
    data = shown(app, "explanations")
    assert data is not None
    assert data["headings"][0]["href"] == "explain?sae=small&by=feature"
    app = visit(explained, "explain", by="recall")
    recalls = [value for value in column(app, "recall", "explanations") if value is not None]
    assert recalls == sorted(recalls, reverse=True)
    assert not visit(explained, "explain", by="drop", who="<b>", at=99).exception


def test_rules_are_found_from_the_page(
    visit: Visit, small_store: Path, tmp_path: Path, own_cache: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(small_store, store)
    app = visit(store, "explain")
    assert shown(app, "empty") is not None
    app = finish(app.button(key="start-explain").click().run())
    assert not app.exception
    done = shown(app, "done-explain")
    assert done is not None
    assert "generation 2" in done["text"]
    assert shown(app, "empty") is not None, "the page stays in its generation until it is left"
    next(b for b in app.main.button if b.label == "Show generation 2 here").click().run()
    assert not app.exception
    assert len(column(app, "feature", "explanations")) > 0
    assert any("--provider openai" in code.value for code in app.code)
