from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash

import saebench_app.serve
from tests.app.conftest import column, shown, url
from tests.app.two_saes import METRICS, SESSION, build_two, write_metrics

Visit = Callable[..., AppTest]


def test_a_finished_run_shows_its_metrics(visit: Visit, two: Path) -> None:
    app = visit(two, "train", sae="other")
    assert not app.exception
    assert column(app, "run", "last") == ["other"]
    assert column(app, "state", "last") == ["finished"]
    assert column(app, "fvu", "last") == [METRICS[-1]["fvu"]]
    assert column(app, "device", "sessions") == [SESSION["device"]]
    assert column(app, "tokens/s", "sessions") == [SESSION["tokens_per_second"]]


def test_controls_write_the_url(visit: Visit, two: Path) -> None:
    app = visit(two, "train")
    app.multiselect(key="measures").set_value(["l0"]).run()
    app.toggle(key="log").set_value(True).run()
    assert url(app) == {"sae": "small", "measures": "l0", "of": "small", "log": "1"}
    app.multiselect(key="trainings").set_value(["small", "other"]).run()
    assert not app.exception
    assert app.query_params["of"] == ["small", "other"]
    assert column(app, "run", "last") == ["other", "small"]
    assert not visit(two, "train", of="<b>", measures="none,fvu", log=1).exception


def test_a_store_without_metrics_says_what_to_do(visit: Visit, tmp_path: Path) -> None:
    app = visit(build_two(tmp_path, runs=False), "train")
    assert not app.exception
    notice = shown(app, "waiting")
    assert notice is not None
    assert "--run" in notice["text"]


def test_a_run_in_training_is_read_again(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "now"
    write_metrics(run, 0)
    monkeypatch.setattr(sys, "argv", ["main.py", str(two), str(run)])
    app = AppTest.from_file(saebench_app.serve.MAIN, default_timeout=30)
    app._page_hash = calc_hash("train")
    app.run()
    assert column(app, "state", "last") == ["running"]
    assert "not reported a step" in shown(app, "waiting")["text"]  # type: ignore[index]
    with open(run / "metrics.jsonl", "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in METRICS[:2]) + '{"step": 3, "tok')
    app.run()
    assert not app.exception
    assert column(app, "fvu", "last") == [METRICS[1]["fvu"]]
    with open(run / "metrics.jsonl", "a") as file:
        file.write('ens": 30, "fvu": 0.25, "l0": 4.0, "dead": 0}\n')
    app.run()
    assert column(app, "fvu", "last") == [0.25]
