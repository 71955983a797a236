"""Prompt, Token, Context and Steer show what the library computes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from streamlit.testing.v1 import AppTest

import saebench as sb
from saebench.core.formatting import CONTINUED, number, visible
from saebench.runs.run import load
from saebench.sources.models import Model, load_model
from saebench.store.query import FeatureStore, open_store
from saebench_app.page.prompt.grid import ROWS
from tests.app.conftest import column, shown, url
from tests.app.live_world import D_SAE, HOOK, World

Visit = Callable[..., AppTest]
TEXT = "The Congress of the United States"
HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "שלום 👩\u200d👩\u200d👧 é",
    "a\u202eevil\n\t&lt;b&gt; *x* $a$",
    "\x00\u200b\ufeff ",
]


@pytest.fixture(scope="session")
def model(tiny_model_folder: Path) -> Model:
    return load_model(str(tiny_model_folder))


@pytest.fixture
def store(world: World) -> Iterator[FeatureStore]:
    with open_store(world.store) as opened:
        yield opened


def data(app: AppTest, key: str) -> dict[str, Any]:
    assert not app.exception
    found = shown(app, key)
    assert found is not None, key
    return found


@torch.no_grad()
def codes(world: World, model: Model, text: str = TEXT) -> torch.Tensor:
    """[T, d_sae]: the SAE's values on the text, straight from the model's activations."""
    sae = load(world.run)
    ids = torch.tensor([model.tokens.encode(text)])
    return sae.encode(model.run_to(ids, [HOOK])[HOOK][0]).to_dense()


# Prompt


def test_the_grid_shows_what_the_sae_encodes(visit: Visit, world: World, model: Model) -> None:
    grid = data(visit(world.store, "prompt", text=TEXT), "heat")
    z_TM = codes(world, model)[1:]
    for row in grid["rows"]:
        z_T = z_TM[:, row["feature"]]
        assert row["exact"] == float(z_T.max())
        fired = {pos: number(float(z_T[pos])) for pos in z_T.nonzero()[:, 0].tolist()}
        assert {place: value for place, _, value in row["cells"]} == fired
    sizes = [row["exact"] for row in grid["rows"]]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == min((z_TM > 0).any(0).sum(), ROWS)


@pytest.mark.parametrize("by", ["sum", "at"])
def test_the_grid_is_sorted_by_the_measure_of_the_url(
    visit: Visit, world: World, model: Model, by: str
) -> None:
    z_TM = codes(world, model)
    grid = data(visit(world.store, "prompt", text=TEXT, by=by, at=3, bos=1), "heat")
    sizes = z_TM[3] if by == "at" else z_TM.sum(0)
    assert [row["exact"] for row in grid["rows"]] == pytest.approx(
        sizes[sizes > 0].sort(descending=True).values[:ROWS].tolist()
    )
    assert [pos for pos, _ in grid["tokens"]] == list(range(len(z_TM)))


def test_the_grid_shows_the_attributions_of_the_library(visit: Visit, world: World, model: Model) -> None:
    app = visit(world.store, "prompt", text=TEXT, by="attribution", at=5)
    found = sb.logit_attribution(TEXT, world.run, model, position=5)
    sums = found.latents.groupby("feature")["attribution"].sum().sort_values(key=abs, ascending=False)
    rows = data(app, "heat")["rows"]
    assert [row["exact"] for row in rows] == pytest.approx(sums.head(ROWS).tolist())
    assert visible(found.target, spaces="edges") in data(app, "target")["text"]
    app.text_input(key="prompt_target").set_value("too long").run()
    assert "exactly one" in data(app, "error")["text"]


def test_a_token_lists_its_features(visit: Visit, world: World, model: Model, store: FeatureStore) -> None:
    app = visit(world.store, "prompt", text=TEXT, at=4)
    z_M = codes(world, model)[4]
    assert column(app, "activation", "token") == z_M[z_M > 0].sort(descending=True).values.tolist()
    features = [int(f) for f in column(app, "feature", "token")]
    assert column(app, "density", "token") == [store.feature(f)["density"] for f in features]
    assert data(app, "passage")["current"] == 4
    assert data(app, "passage")["link"] == "prompt?" + "sae=tiny&text=" + TEXT.replace(" ", "+") + "&at="


def test_pinned_features_come_first_whatever_the_density_limit(
    visit: Visit, world: World, model: Model
) -> None:
    z_TM = codes(world, model)
    silent = int((z_TM == 0).all(0).nonzero()[0])
    fires = int(z_TM[2].argmax())
    app = visit(world.store, "prompt", text=TEXT, f=silent, pin=f"{fires},{D_SAE + 9}", cut=-9)
    rows = data(app, "heat")["rows"]
    assert [row["feature"] for row in rows] == [silent, fires]  # others are denser than the cut
    assert [row["pinned"] for row in rows] == [True, True]
    assert (
        rows[1]["pin"] == f"prompt?sae=tiny&text={TEXT.replace(' ', '+')}&cut=-9&pin={D_SAE + 9}&f={silent}"
    )
    assert data(app, "passage")["legend"][0]["name"] == f"Feature {silent}"
    app.slider(key="prompt_cut").set_value(-3.0).run()
    assert "No feature" in data(app, "inactive")["text"]
    app = visit(world.store, "prompt", text=TEXT, f=fires)
    acts = [span[2] for span in data(app, "passage")["spans"]]
    assert acts == [number(float(z)) if z else "" for z in z_TM[:, fires]]


def test_a_second_text_lists_the_differences_of_the_library(visit: Visit, world: World, model: Model) -> None:
    other = "the price of corn"
    app = visit(world.store, "prompt", text=TEXT, text2=other)
    found = sb.compare_prompts(TEXT, other, world.run, model).head(ROWS)
    assert [int(f) for f in column(app, "feature", "changes")] == found["feature"].tolist()
    assert column(app, "difference", "changes") == found["difference"].tolist()
    assert len(data(app, "passage2")["spans"]) == len(model.tokens.encode(other))
    app.slider(key="prompt_cut").set_value(-3.0).run()
    assert "density limit" in data(app, "none")["text"]


@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_is_shown_as_it_is(visit: Visit, world: World, text: str) -> None:
    app = visit(world.store, "prompt", text=text)
    spans = data(app, "passage")["spans"]
    shown_text = "".join(span[0] for span in spans).replace(CONTINUED, "")
    assert shown_text.replace("␣", " ") == visible(text).replace("␣", " ")
    assert not [m.value for m in [*app.markdown, *app.caption] if text in m.value]


def test_controls_write_the_url_of_the_prompt(visit: Visit, world: World) -> None:
    app = visit(world.store, "prompt")
    assert "Enter a text" in data(app, "empty")["text"]
    app.text_area(key="prompt_text").set_value(TEXT).run()
    assert url(app) == {"sae": "tiny", "text": TEXT}
    app.toggle(key="prompt_bos").set_value(True).run()
    app.slider(key="prompt_cut").set_value(-1.0).run()
    assert url(app) == {"sae": "tiny", "text": TEXT, "cut": "-1", "bos": "1"}
    assert data(app, "heat")["tokens"][0][0] == 0
    app.toggle(key="prompt_two").set_value(True).run()
    app.text_area(key="prompt_text2").set_value("corn").run()
    assert url(app)["text2"] == "corn"
    app.toggle(key="prompt_two").set_value(False).run()
    assert "text2" not in url(app)


def test_a_text_that_is_too_long_gives_an_error(visit: Visit, world: World) -> None:
    app = visit(world.store, "prompt", text="no " * 90)
    assert "shorten it" in data(app, "error")["text"]


@pytest.mark.parametrize("page", ["prompt", "steer"])
def test_without_a_run_the_page_says_what_to_do(visit: Visit, small_store: Path, page: str) -> None:
    app = visit(small_store, page, text=TEXT, f=1)
    assert "--run DIR" in data(app, "no-run")["text"]


# Token


def test_a_token_shows_the_numbers_of_the_store(visit: Visit, world: World, store: FeatureStore) -> None:
    token = store.find_tokens(limit=1).iloc[0]
    for wanted in (token["text"], f"#{token['token']}"):
        app = visit(world.store, "token", t=wanted, by="lift")
        found = store.features_on(int(token["token"]), order_by="lift")
        assert [int(f) for f in column(app, "feature", "features-on")] == found["feature"].tolist()
        for label, name in {
            "count": "n",
            "P(fires|token)": "p_fire_given_token",
            "P(token|fires)": "p_token_given_fire",
            "lift": "lift",
        }.items():
            assert column(app, label, "features-on") == found[name].tolist()
        first = int(found["feature"][0])
        drawn = store.examples_on(first, int(token["token"]), n=10)
        assert [one["exact"] for one in data(app, "examples")["examples"]] == drawn["value"].tolist()
        one = drawn.iloc[0]
        assert data(app, "examples")["examples"][0]["href"] == (
            f"context?sae=tiny&c={one['ctx']}&f1={first}&pos={one['pos']}"
        )


def test_tokens_are_found_by_a_part_of_them(visit: Visit, world: World, store: FeatureStore) -> None:
    app = visit(world.store, "token", t="zzzz")
    assert "try a part" in data(app, "none")["text"]
    app = visit(world.store, "token")
    assert column(app, "id", "found")[:5] == store.find_tokens(limit=5)["token"].tolist()
    app.text_input(key="token_text").set_value("h").run()
    assert url(app)["t"] == "h"
    exact = store.find_tokens(token="h")["token"].tolist()
    others = [token for token in store.find_tokens("h", limit=50)["token"] if token not in exact]
    assert column(app, "id", "found") == others
    app = visit(world.store, "token", t="#99999")
    assert "not in the vocabulary" in data(app, "error")["text"]


@pytest.mark.parametrize(("page", "key"), [("token", "no-tokens"), ("context", "no-contexts")])
def test_a_store_without_text_gives_the_reason(
    visit: Visit, textless_store: Path, page: str, key: str
) -> None:
    with open_store(textless_store) as opened:
        reasons = set(opened.info()["missing"].values())
    said = data(visit(textless_store, page), key)["text"]
    assert any(said.endswith(f"{reason.rstrip('.')}.") for reason in reasons)


# Context


def test_a_context_shows_the_activations_of_its_features(
    visit: Visit, world: World, store: FeatureStore
) -> None:
    fires = store.context_features(2)
    features = fires["feature"].value_counts().index[:3].tolist()
    pos = int(fires[fires["feature"] == features[0]]["pos"].iloc[0])
    query = {f"f{lane}": feature for lane, feature in enumerate(features, 1)}
    app = visit(world.store, "context", c=2, pos=pos, **query)
    text = data(app, "context-text")
    assert "".join(span[0] for span in text["spans"]) == "".join(map(visible, store.context(2)["pieces"]))
    for lane, feature in enumerate(features):
        largest = store.feature(feature)["max_act"]
        on = {at: span[1][lane] for at, span in enumerate(text["spans"]) if span[1][lane]}
        mine = fires[fires["feature"] == feature]
        expected = dict(zip(mine["pos"], (mine["value"] / largest).round(3), strict=True))
        assert on == pytest.approx(expected, abs=1e-3)
    here = store.firing_at(2, pos)
    assert [int(f) for f in column(app, "feature", "fires")] == here["feature"].tolist()
    assert column(app, "activation", "fires") == here["value"].tolist()
    assert text["legend"][1]["links"][0][1] == (
        f"context?sae=tiny&c=2&pos={pos}&f1={features[0]}&f2={features[2]}"
    )
    app.button[1].click().run()
    assert url(app) == {"sae": "tiny", "c": "3", **{name: str(f) for name, f in query.items()}}


def test_without_an_index_by_context_the_search_waits_for_a_click(visit: Visit, small_store: Path) -> None:
    app = visit(small_store, "context", pos=3)
    assert "--with-context-index" in data(app, "no-index")["text"]
    next(button for button in app.button if button.label == "Find the features").click().run()
    with open_store(small_store) as opened:
        assert column(app, "activation", "fires") == opened.firing_at(0, 3)["value"].tolist()


def test_a_context_or_feature_that_does_not_exist_gives_an_error(visit: Visit, world: World) -> None:
    for query in ({"c": 10**6}, {"c": 0, "f1": D_SAE}):
        assert "not in" in data(visit(world.store, "context", **query), "error")["text"]


# Steer


@pytest.mark.parametrize(
    ("query", "settings"),
    [
        ({"how": "add", "strength": "4, 30"}, {"mode": "add", "strength": [4, 30]}),
        ({"how": "ablate"}, {"mode": "clamp", "strength": [0]}),
        (
            {"how": "scale", "strength": "-2", "temp": "0.7", "seed": "3"},
            {"mode": "scale", "strength": [-2], "temperature": 0.7, "seed": 3},
        ),
    ],
)
def test_steering_shows_the_texts_of_the_library(
    visit: Visit, world: World, model: Model, query: dict[str, str], settings: dict[str, Any]
) -> None:
    app = visit(world.store, "steer", text=TEXT, f="3,5", new=6, **query)
    assert "Press Steer" in data(app, "ready")["text"]
    before = url(app)
    app.button(key="steer_start").click().run()
    assert url(app) == before
    found = sb.steer(TEXT, [3, 5], world.run, model, new_tokens=6, **settings)
    text = found.texts.iloc[0]
    assert [span[0] for span in data(app, "base")["spans"]] == [TEXT, visible(text["clean"])]
    assert [span[0] for span in data(app, "steered")["spans"]] == [TEXT, visible(text["steered"])]
    strength = settings["strength"][0]
    nexts = found.next_tokens[found.next_tokens["strength"] == strength]
    assert column(app, "change", "next") == pytest.approx(nexts["difference"].tolist())
    assert (shown(app, "sweep") is not None) == (len(settings["strength"]) > 1)
    app.number_input(key="steer_new").set_value(7).run()
    assert shown(app, "steered") is None


def test_strengths_that_are_not_numbers_give_an_error(visit: Visit, world: World) -> None:
    for strength in ("a", "1,nan", ",", ",".join("1" * 13)):
        app = visit(world.store, "steer", text=TEXT, f=3, strength=strength)
        assert "numbers with commas" in data(app, "strengths")["text"]
    assert "Enter a feature" in data(visit(world.store, "steer", text=TEXT), "empty")["text"]


# A run that is deleted


def test_a_run_that_is_deleted_gives_an_error(visit: Visit, world: World, tmp_path: Path) -> None:
    shutil.copytree(world.store, tmp_path / "store")
    shutil.copytree(world.run, tmp_path / "runs" / "tiny")
    app = visit(tmp_path / "store", "prompt", text=TEXT)
    assert data(app, "heat")["rows"]
    shutil.rmtree(tmp_path / "runs")
    app.run()
    assert "--run DIR" in data(app, "no-run")["text"]
