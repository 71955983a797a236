from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from saebench.core.formatting import visible
from saebench.store.example_windows import distinct
from saebench.store.query import open_store
from saebench_app.page.feature.panels import LONGEST_NAME
from saebench_app.view import View
from tests.app.conftest import column, shown, url
from tests.store.rich_store import HOSTILE

Visit = Callable[..., AppTest]


@pytest.fixture
def own_store(rich_store: Path, tmp_path: Path) -> Path:
    """A store that a test may change."""
    return Path(shutil.copytree(rich_store, tmp_path / "store"))


def data(app: AppTest, key: str) -> dict[str, Any]:
    assert not app.exception
    found = shown(app, key)
    assert found is not None, key
    return found


def options(app: AppTest, key: str, choice: str) -> dict[str, dict[str, Any]]:
    """The links above an element, by label."""
    [found] = [one for one in data(app, key)["head"]["choices"] if one["label"] == choice]
    return {option["label"]: option for option in found["options"]}


@pytest.mark.parametrize("kind", ["value", "log10"])
def test_a_bar_leads_to_examples_from_it_and_back(visit: Visit, small_store: Path, kind: str) -> None:
    app = visit(small_store, "feature", f=3, hist=kind, bin=39)
    bars = data(app, "histogram")["bars"]
    with open_store(small_store) as store:
        counts = store.histogram(3, kind)["count"].tolist()
        drawn = store.examples_in_bin(3, 39, kind, n=20)
    assert [bar["size"] for bar in bars] == counts
    assert [bar["current"] for bar in bars] == [False] * 39 + [True]
    plain = View(sae="small", histogram=kind)
    assert bars[39]["href"] == plain.url("feature", f=3)
    assert "bin=0" in bars[0]["href"]
    assert [one["exact"] for one in data(app, "examples")["examples"]] == drawn["value"].tolist()
    assert options(app, "examples", "Which examples")["Bar 40"]["current"]


def test_deciles_have_titles_and_examples_name_their_fold(visit: Visit, small_store: Path) -> None:
    app = visit(small_store, "feature", f=0, group="tenths")
    picture = data(app, "examples")["examples"]
    with open_store(small_store) as store:
        every = store.examples(0)
    tenths = every[every["group"].str.startswith("decile-")]
    assert len(picture) == len(tenths)
    assert sum(bool(one["title"]) for one in picture) == tenths["group"].nunique()
    assert sorted(one["place"][-1] for one in picture) == sorted(map(str, tenths["fold"]))


def test_the_url_sets_color_scale_threshold_line_breaks_and_duplicates(
    visit: Visit, small_store: Path
) -> None:
    with open_store(small_store) as store:
        rows = store.examples(0, "top").to_dict("records")
        largest = store.feature(0)["max_act"]
    app = visit(small_store, "feature", f=0, window=0, above=50, colors="sqrt", lines=1)
    for one, row in zip(data(app, "examples")["examples"], rows, strict=True):
        colored = [len(span) == 3 for span in one["spans"]]
        assert colored == [abs(act) >= largest / 2 for act in row["acts"]]
        texts = [span[0] for span in one["spans"]]
        assert texts == [visible(piece).replace("↵", "↵\n") for piece in row["pieces"]]
    levels = [s[1] for one in data(app, "examples")["examples"] for s in one["spans"] if len(s) == 3]
    acts = [a for row in rows for a in row["acts"] if a >= largest / 2]
    assert levels == pytest.approx([(a / largest) ** 0.5 for a in acts], abs=1e-3)
    app = visit(small_store, "feature", f=0, window=0, colors="rank")
    ranked = [
        (act, span[1])
        for one, row in zip(data(app, "examples")["examples"], rows, strict=True)
        for span, act in zip(one["spans"], row["acts"], strict=True)
        if len(span) == 3
    ]
    assert [level for _, level in sorted(ranked)] == sorted(level for _, level in ranked)
    assert max(level for _, level in ranked) == 1
    app = visit(small_store, "feature", f=0, window=4, distinct=1)
    assert len(data(app, "examples")["examples"]) == len(distinct(rows, 4))


@pytest.mark.parametrize("role", ["previous", "active", "next"])
def test_the_token_panel_shows_active_previous_and_next_tokens(
    visit: Visit, small_store: Path, role: str
) -> None:
    app = visit(small_store, "feature", f=3, role=role)
    with open_store(small_store) as store:
        tokens = store.tokens(3, role)
    assert column(app, "P(token|fires)", "tokens") == tokens["p_token_given_fire"].tolist()
    assert sum(option["current"] for option in options(app, "tokens", "Token").values()) == 1


@pytest.mark.parametrize("kind", ["decoder", "encoder", "cofire", "correlation"])
def test_similar_features_of_every_kind_are_listed_with_their_names(
    visit: Visit, rich_store: Path, kind: str
) -> None:
    app = visit(rich_store, "feature", f=0, near=kind)
    with open_store(rich_store) as store:
        near = store.neighbors(0, kind).head(10)
        rows = {f: store.feature(f) for f in near["other"]}
    assert column(app, "feature", "neighbors") == near["other"].tolist() != []
    called = [HOSTILE if f == 3 else row["explanation"] or "" for f, row in rows.items()]
    called = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in called]
    if any(called):
        assert column(app, "name", "neighbors") == [visible(name) if name else None for name in called]


def test_a_closed_part_asks_the_store_nothing(
    visit: Visit, rich_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saebench.store.query import FeatureStore

    asked: list[str] = []
    for name in ("explanations", "explanation_items", "positions", "labels", "examples_in_bin"):
        monkeypatch.setattr(FeatureStore, name, lambda self, *a, name=name, **k: asked.append(name))
    app = visit(rich_store, "feature", f=3)
    assert not app.exception
    assert asked == []


def test_explanations_are_shown_with_scores_and_verdicts(visit: Visit, rich_store: Path) -> None:
    app = visit(rich_store, "feature", f=3)
    lead = data(app, "lead")
    assert (lead["label"], lead["explanation"]) == (HOSTILE, f"{HOSTILE} 3")
    app = visit(rich_store, "feature", f=3, open="explanations,verdicts,where")
    assert column(app, "explanation", "explanations") == [f"{HOSTILE} 3"]
    assert column(app, "score", "explanations") == [0.75]
    assert column(app, "unanswered", "scores") == ["0"]
    answers = [one["value"] for one in data(app, "verdicts")["examples"]]
    assert answers == ["✓ yes", "✗ no", "✗ failed"]
    marked = [len(span) == 3 for span in data(app, "verdicts")["examples"][0]["spans"]]
    assert marked == [False, True, True, False, False, False]
    with open_store(rich_store) as store:
        assert [bar["size"] for bar in data(app, "positions")["bars"]] == store.positions(3)[
            "p_fire"
        ].tolist()
        assert column(app, "lift", "labels") == store.labels(3)["lift"].tolist()


def test_a_feature_without_explanation_names_the_command(visit: Visit, rich_store: Path) -> None:
    app = visit(rich_store, "feature", f=1, open="explanations")
    assert "saebench explain" in data(app, "unexplained")["text"]


def test_the_tiles_show_the_intervals_of_the_library(visit: Visit, small_store: Path) -> None:
    from saebench.core.formatting import number, share
    from saebench.store.intervals import standard_error, wilson

    tiles = {tile["name"]: tile for tile in data(visit(small_store, "feature", f=3), "statistics")["tiles"]}
    with open_store(small_store) as store:
        row, n = store.feature(3), store.info()["n_tokens"]
    low, high = wilson(row["n_act"], n)
    assert tiles["Activation density"]["note"] == f"{share(low)} to {share(high)}"
    error = number(standard_error(row["std_act"], row["n_act"]), 2)
    assert tiles["Mean activation"]["value"].endswith(f"± {error}")


def test_label_bookmark_and_comment_are_kept(visit: Visit, own_store: Path) -> None:
    app = visit(own_store, "feature", f=7)
    app.text_input(key="label").set_value("  sevens ").run()
    app.button(key="bookmark").click().run()
    assert data(app, "lead")["label"] == "sevens"
    assert app.button(key="bookmark").label == "Bookmarked"
    with open_store(own_store) as store:
        assert store.annotations.label(7) == "sevens"
        assert 7 in store.annotations.bookmarks()["feature"].tolist()
    app.button(key="bookmark").click().run()
    app.text_input(key="label").set_value("").run()
    with open_store(own_store) as store:
        assert store.annotations.label(7) is None
        assert 7 not in store.annotations.bookmarks()["feature"].tolist()


def test_random_stays_within_the_filter(visit: Visit, small_store: Path) -> None:
    app = visit(small_store, "feature", f=3, dense="only")
    with open_store(small_store) as store:
        listed = store.features(flags={"dense": True})["feature"].tolist()
    app.button(key="Random").click().run()
    assert int(url(app)["f"]) in listed
    assert url(app)["dense"] == "only"


def test_an_annotation_that_cannot_be_written_gives_an_error(visit: Visit, own_store: Path) -> None:
    app = visit(own_store, "feature", f=7)
    (own_store / "user.sqlite").write_bytes(b"no database at all" * 100)
    app.text_input(key="label").set_value("x").run()
    notice = shown(app, "error") or shown(app, "said")
    assert not app.exception
    assert notice is not None and "annotations" in notice["text"]
