from __future__ import annotations

import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from saebench.core.csv_text import as_csv
from saebench.store.query import open_store
from saebench_app.page.features import as_parquet
from saebench_app.page.features.columns import COLUMNS
from saebench_app.page.features.filters import PILLS, press, pressed
from saebench_app.view import View
from tests.app.conftest import column, shown, url
from tests.store.rich_store import EFFECTS, HOSTILE, SCORES

Visit = Callable[..., AppTest]


def test_every_column_can_be_chosen_and_sorted_by(visit: Visit, rich_store: Path) -> None:
    names = ["skew", "loss_effect", "explanation_score", "top_token_p_fire", "label"]
    labels = {column.name: column.label for column in COLUMNS}
    app = visit(rich_store, "features", columns=",".join(names), sort="loss_effect", desc=1)
    data = shown(app, "features")
    assert data is not None
    assert [heading["label"] for heading in data["headings"]] == [
        "feature",
        *(labels[name] for name in names),
        "marks",
    ]
    assert column(app, "feature")[:3] == sorted(EFFECTS, key=EFFECTS.__getitem__, reverse=True)
    assert column(app, "loss effect")[:3] == sorted(EFFECTS.values(), reverse=True)
    with open_store(rich_store) as store:
        stored = store.features(order_by="loss_effect", descending=True)
    assert column(app, "skew") == stored["skew"].tolist()


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"q": "onerror"}, lambda f: f in SCORES or f == 3),
        ({"q": r"^<img.* 9$", "re": 1}, lambda f: f == 9),
        ({"bookmarked": 1}, lambda f: f in (3, 5)),
        ({"labeled": 1}, lambda f: f == 3),
        ({"list": HOSTILE, "bookmarked": 1}, lambda f: f in (3, 5)),
        ({"list": HOSTILE}, lambda f: f in (3, 5, 9)),
        ({"among": "9,3,7", "explained": "only"}, lambda f: f in (3, 9)),
        ({"score": "0.4.."}, lambda f: SCORES.get(f, 0) >= 0.4),
        ({"effect": "..0.2"}, lambda f: EFFECTS.get(f, 1) <= 0.2),
    ],
)
def test_the_url_filters_by_annotations_and_extra_tables(
    visit: Visit, rich_store: Path, query: dict[str, object], expected: Callable[[int], bool]
) -> None:
    app = visit(rich_store, "features", **query)
    assert not app.exception
    with open_store(rich_store) as store:
        tokens = store.features()["top_token"]
    found = column(app, "feature")
    in_token = {f for f, token in enumerate(tokens) if "onerror" in str(token)} if "q" in query else set()
    if query.get("re"):
        in_token = set()
    assert set(found) == {f for f in range(24) if expected(f)} | in_token
    assert found == sorted(found)


def test_labels_and_bookmarks_are_in_the_table(visit: Visit, rich_store: Path) -> None:
    app = visit(rich_store, "features")
    assert column(app, "label")[3] == HOSTILE
    assert "bookmarked" in column(app, "marks")[5]
    assert "bookmarked" not in (column(app, "marks")[4] or "")


@pytest.mark.parametrize("query", [{"q": "(", "re": 1}, {"list": "no such list"}])
def test_an_invalid_filter_gives_an_error_below_the_controls(
    visit: Visit, rich_store: Path, query: dict[str, object]
) -> None:
    for page in ("features", "feature"):
        app = visit(rich_store, page, **query, **({"f": 3} if page == "feature" else {}))
        assert not app.exception
        assert shown(app, "refused") is not None
    app = visit(rich_store, "features", **query)
    app.button[-1].click().run()
    assert url(app) == {"sae": "small"}


def test_a_control_of_each_kind_writes_the_url(visit: Visit, rich_store: Path) -> None:
    app = visit(rich_store, "features")
    app.slider(key="score").set_value((0.4, 1.0)).run()
    app.toggle(key="regex").set_value(True).run()
    assert url(app) == {"sae": "small", "score": "0.4..", "re": "1"}
    app.pills(key="kinds").set_value(["alive", "unexplained"]).run()
    assert (url(app)["dead"], url(app)["explained"]) == ("hide", "hide")


def test_there_is_a_slider_for_each_column_of_the_store(
    visit: Visit, small_store: Path, rich_store: Path
) -> None:
    def keys(store: Path) -> set[str]:
        return {slider.key for slider in visit(store, "features").slider}

    assert keys(rich_store) - keys(small_store) == {"loss_effect", "score"}
    assert {"log_density", "max_act", "token_share", "selectivity", "similarity"} == keys(small_store)


def test_of_two_pills_that_exclude_each_other_the_new_one_wins() -> None:
    kinds = list(PILLS)
    view = View(sae="s", dead="hide", bookmarked=True)
    assert pressed(view, kinds) == ["alive", "bookmarked"]
    fields = press(view, kinds, ["alive", "dead", "bookmarked"])
    assert (fields["dead"], fields["bookmarked"], fields["dense"]) == ("only", True, "any")
    assert press(view, kinds, [])["dead"] == "any"


def test_downloads_hold_the_numbers_of_the_store(rich_store: Path) -> None:
    with open_store(rich_store) as store:
        frame = store.features(order_by="density", descending=True)
    again = pd.read_parquet(BytesIO(as_parquet(frame)))
    assert again["feature"].tolist() == frame["feature"].tolist()
    assert again["explanation"].tolist()[:5] == frame["explanation"].tolist()[:5]
    text = pd.read_csv(BytesIO(as_csv(frame)), keep_default_na=False, float_precision="round_trip")
    assert text["density"].tolist() == frame["density"].tolist()
    assert text["top_token"].fillna("").tolist()[0] == frame["top_token"][0]


def test_a_deleted_store_gives_an_error_and_a_new_one_is_shown(
    visit: Visit, rich_store: Path, tmp_path: Path
) -> None:
    from tests.store.small_store import build_small_store

    store = Path(shutil.copytree(rich_store, tmp_path / "store"))
    app = visit(store, "features", sort="max_act", desc=1)
    before = column(app, "feature")
    shutil.rmtree(store)
    app.run()
    assert not app.exception
    notice = shown(app, "gone")
    assert notice is not None and "not a feature store" in notice["text"]
    assert column(app, "feature") == before
    build_small_store(store, seed=5)
    app.run()
    assert app.sidebar.button[0].label == "Show generation 1"
    app.sidebar.button[0].click().run()
    assert not app.exception
    with open_store(store) as anew:
        expected = anew.features(order_by="max_act", descending=True)["feature"].tolist()
    assert column(app, "feature") == expected != before
