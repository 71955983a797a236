from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from streamlit.testing.v1 import AppTest

from saebench.core.errors import UserError
from saebench.runs.run import load
from saebench.store.query import FeatureStore, open_store
from saebench_app.launch import explore
from saebench_app.runs import TURN, attached, known_runs, live, run_of, turn
from saebench_app.session import Here
from saebench_app.view import View
from tests.app.live_world import World

At = Callable[..., Here]


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Iterator[At]:
    """``at(store, *runs)``: what a page is given when the server was started so."""
    opened: list[FeatureStore] = []

    def go(store: Path, *runs: Path) -> Here:
        monkeypatch.setattr(sys, "argv", ["main.py", str(store), *map(str, runs)])
        opened.append(open_store(store))
        return Here(opened[-1], View(sae=opened[-1].sae), {})

    yield go
    for store in opened:
        store.close()


def test_a_run_beside_the_store_is_found_by_its_weights(at: At, world: World, tmp_path: Path) -> None:
    here = at(world.store)
    found = run_of(here)
    assert found is not None and found.path == world.run
    assert torch.equal(attached(here).sae.W_dec, load(world.run).W_dec)
    assert live(here) is live(here)
    away = tmp_path / "store"
    shutil.copytree(world.store, away)
    assert run_of(at(away)) is None
    found = run_of(at(away, world.run))
    assert found is not None and found.path == world.run


def test_a_run_with_other_weights_is_not_found(at: At, world: World, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(world.store, folder / "store")
    other = folder / "runs" / "other"
    shutil.copytree(world.run, other)
    sae = load(other)
    with torch.no_grad():
        sae.W_dec[0, 0] += 1
    sae.save(other, hook_name="blocks.0.hook_resid_post")
    (folder / "runs" / "unfinished").mkdir()
    (folder / "runs" / "damaged").mkdir()
    (folder / "runs" / "damaged" / "sae.json").write_text("{")
    here = at(folder / "store")
    assert len(known_runs()) == 3
    assert run_of(here) is None
    with pytest.raises(UserError, match=r"saebench explore .* --run DIR"):
        live(here)


def test_a_run_without_an_sae_is_refused_at_once(world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no SAE .*; name a run directory"):
        explore(world.store, runs=[tmp_path], port=1, open_browser=False)


def test_one_page_at_a_time_runs_the_model() -> None:
    def page() -> None:
        import streamlit as st

        from saebench_app.runs import turn

        with turn():
            st.title("mine")

    with turn():
        assert TURN.locked()
        app = AppTest.from_function(page, default_timeout=30)
        runner = threading.Thread(target=app.run)
        runner.start()
        runner.join(1.0)
        assert runner.is_alive()
    runner.join(20)
    assert app.title[0].value == "mine"
    assert not TURN.locked()
