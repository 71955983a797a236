"""Figures show the given numbers; tokens and names are escaped."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from saebench.analysis import figures
from saebench.analysis.interventions import Steering
from saebench.analysis.matching import match
from saebench.analysis.plot_style import HOT, KINDS
from saebench.core.errors import UserError
from tests.analysis.test_matching import random_sae


def fires(*rows: tuple[int, str, int, float]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["pos", "token", "feature", "value"])
    return frame.assign(first=frame["pos"] == 0)


PROMPT = fires(
    (0, "<b>", 9, 90.0), (1, " <img src=x>", 4, 3.0), (1, " <img src=x>", 2, 1.0), (2, "\n", 4, 5.0),
    (3, "&lt;", 7, 2.0), (3, "&lt;", 8, 0.5),
)  # fmt: skip
POINTS = pd.DataFrame(
    {"feature": range(12), "x": np.arange(12.0), "y": np.arange(12.0) ** 2, "cluster": np.arange(12) % 9}
)


def test_histogram_has_the_count_of_every_bin() -> None:
    bins = pd.DataFrame({"lo": [0.0, 1.0, 2.0], "hi": [1.0, 2.0, 3.0], "count": [100, 0, 1]})
    [bars] = figures.histogram(bins).data
    assert bars.y.tolist() == [100, 0, 1]
    assert (bars.x - bars.width / 2).tolist() == [0, 1, 2] and (bars.x + bars.width / 2).tolist() == [1, 2, 3]


def test_density_histogram_bins_are_logarithmic() -> None:
    density = np.array([0.0, 0.0, 1e-4, 1e-4, 1e-3, 0.2])
    figure = figures.density_histogram(pd.DataFrame({"density": density}))
    [bars] = figure.data
    assert bars.y.sum() == 4 and bars.y[0] == 2 and bars.y[-1] == 1
    assert bars.customdata[0, 0] == pytest.approx(1e-4) and bars.customdata[-1, 1] == pytest.approx(0.2)
    assert "0.01%" in figure.layout.xaxis.ticktext
    assert figure.layout.annotations[0].text == "2 of 6 never fire"
    assert figures.density_histogram(pd.DataFrame({"density": [0.0]})).data[0].y.sum() == 0


def test_prompt_heatmap_has_top_latents_and_escaped_tokens() -> None:
    figure = figures.prompt_heatmap(PROMPT, top=3)
    [heat] = figure.data
    assert list(heat.y) == ["4", "7", "2"]
    assert heat.z.tolist() == [[3, 5, 0], [0, 0, 2], [1, 0, 0]]
    labels = list(figure.layout.xaxis.ticktext)
    assert labels == ["·&lt;img·src=x&gt;", "\u23ce", "&amp;lt;"]
    assert "<img" not in figure.to_json()
    with_first = figures.prompt_heatmap(PROMPT, keep_first=True)
    assert with_first.data[0].y[0] == "9" and len(with_first.layout.xaxis.ticktext) == 4


def test_decoder_scatter_has_every_latent_and_its_color() -> None:
    figure = figures.decoder_scatter(POINTS)
    assert sum(len(trace.x) for trace in figure.data) == 12
    assert [trace.name for trace in figure.data] == [str(c) for c in range(9)]
    assert figure.data[0].marker.color == figure.data[8].marker.color == KINDS[0]  # colors repeat
    features = pd.DataFrame(
        {"feature": range(12), "density": [0.0, *[0.01] * 11], "top_token": ["<b>", None, *["x"] * 10]}
    )
    [points] = figures.decoder_scatter(POINTS, "density", features).data
    assert np.isnan(points.marker.color[0]) and points.marker.color[1] == pytest.approx(-2)
    assert points.text[0] == "feature 0<br>&lt;b&gt;" and points.text[1] == "feature 1<br>"


def test_matching_similarity_counts_pairs_per_bin() -> None:
    found = match(random_sae(30, 4, 1), random_sae(40, 4, 2), quiet=True)
    figure = figures.matching_similarity(found)
    [bars] = figure.data
    assert bars.y.sum() == 30
    above = [color == HOT for color in bars.marker.color]
    assert bars.y[above].sum() == (found.pairs["similarity"] >= found.threshold).sum()
    assert f"{found.stability:.1%}" in figure.layout.annotations[0].text


def test_steering_curve_has_one_point_per_strength() -> None:
    effects = pd.DataFrame(
        {
            "strength": np.repeat([-1.0, 2.0], 3), "pos": [0, 1, 2] * 2, "edited": [False, True, True] * 2,
            "kl": [9.0, 1.0, 3.0, 9.0, 5.0, 7.0], "difference": [9.0, -4.0, np.nan, 9.0, 2.0, np.nan],
        }
    )  # fmt: skip
    steering = Steering(effects, pd.DataFrame(), pd.DataFrame())
    mean, largest = figures.steering_curve(steering).data
    assert (mean.x.tolist(), mean.y.tolist(), largest.y.tolist()) == ([-1, 2], [2, 6], [3, 7])
    mean, largest = figures.steering_curve(steering, "difference").data
    assert mean.y.tolist() == largest.y.tolist() == [-4, 2]


def test_training_curves_have_one_line_per_run_and_measure(tmp_path: Path) -> None:
    for name, values in {"a": [0.5, 0.25], "<b>": [0.75, 0.5]}.items():
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": i, "tokens": 10 * i, "fvu": v, "l0": 3}) for i, v in enumerate(values)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join([*lines, '{"tokens": 2']))
    figure = figures.training_curves([tmp_path / "a", tmp_path / "<b>"], ["fvu", "l0"])
    assert [list(trace.y) for trace in figure.data] == [[0.5, 0.25], [3, 3], [0.75, 0.5], [3, 3]]
    assert [list(trace.x) for trace in figure.data] == [[0, 10]] * 4
    assert figure.data[2].name == "&lt;b&gt;" and figure.layout.showlegend
    assert len({trace.line.color for trace in figure.data}) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no metrics.jsonl; name a run directory"):
        figures.training_curves(tmp_path / "empty")
    with pytest.raises(
        UserError, match="'kl' is not a measure of these runs; give one of step, tokens, fvu, l0"
    ):
        figures.training_curves(tmp_path / "a", ["kl"])
    with pytest.raises(UserError, match="runs is empty"):
        figures.training_curves([])


def test_figures_are_transparent_and_serializable() -> None:
    found = match(random_sae(5, 4, 1), random_sae(5, 4, 2), quiet=True)
    for figure in (
        figures.prompt_heatmap(PROMPT), figures.decoder_scatter(POINTS), figures.matching_similarity(found)
    ):  # fmt: skip
        assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0, 0, 0, 0)"
        assert json.loads(figure.to_json())["data"]


@pytest.mark.parametrize(
    ("draw", "arguments", "sentence"),
    [
        ("histogram", [PROMPT], "bins has no column 'lo'; give what store.histogram"),
        ("histogram", [None], "bins has no column 'lo'"),
        ("density_histogram", [PROMPT], "features has no column 'density'"),
        ("prompt_heatmap", [POINTS], "found has no column 'pos'; give what features_of"),
        ("prompt_heatmap", [PROMPT, 0], "top is 0; it must be at least 1"),
        ("prompt_heatmap", [PROMPT[:1]], "no latent that fires after position 0; give keep_first=True"),
        ("prompt_heatmap", [fires(*((i, "", 1, 1) for i in range(600)))], "has 599 tokens; give at most 512"),
        ("decoder_scatter", [PROMPT], "points has no column 'x'"),
        ("decoder_scatter", [POINTS, "density"], "color is 'density'; give one of cluster"),
        ("decoder_scatter", [POINTS, "cluster", PROMPT.drop(columns="feature")], "features has no column"),
        ("steering_curve", [SimpleNamespace(), "loss"], "measure is 'loss'; give 'kl' or 'difference'"),
    ],
)  # fmt: skip
def test_invalid_arguments_raise_user_error(draw: str, arguments: list[Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        getattr(figures, draw)(*arguments)
