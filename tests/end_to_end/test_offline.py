"""Nothing leaves this machine, and hostile pages, stores and links do nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, expect

from tests.app.live_world import World
from tests.end_to_end.conftest import Visitor
from tests.end_to_end.serving import served
from tests.torture.hostile_pages import recorded

ROOT = Path(__file__).parents[2]
PAGES = [
    "", "features", "feature?f=3", "prompt?text=The+year", "token", "context?c=0", "compare", "map", "steer",
    "explain", "train", "lists", "sql?query=SELECT+1",
]  # fmt: skip


@pytest.mark.slow
def test_a_run_through_all_pages_makes_no_request_to_another_machine(
    context: BrowserContext, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the browser, the server with a model, and a job; requests of other sites included."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("SAEBENCH_CACHE", str(tmp_path / "cache"))
    with recorded(tmp_path) as attempts, served(world.store) as address:
        visitor = Visitor(context.new_page(), address)
        visitor.watch()
        for path in PAGES:
            page = visitor.go(path)
        page = visitor.go("")
        page.get_by_role("button", name="Check the store", exact=True).click()
        expect(page.get_by_role("button", name="Check again", exact=True)).to_be_visible(timeout=60_000)
        headers = {"Origin": "http://attacker.test", "Host": "attacker.test"}
        assert context.request.get(f"{address}/features", headers=headers).status == 403
        visitor.page.close()
        assert (visitor.foreign, attempts()) == ([], [])


@pytest.mark.slow
def test_hostile_pages_stores_and_links_do_nothing(tmp_path: Path) -> None:
    """In a process of its own: Playwright runs once per process."""
    out = tmp_path / "out.json"
    line = [sys.executable, "-m", "tests.torture", "--only", "hostile_pages", "--minutes", "0.1"]
    ran = subprocess.run([*line, "--out", str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    (outcome,) = json.loads(out.read_text())["parts"]
    assert (ran.returncode, outcome["failures"]) == (0, [])
    assert outcome["notes"]["requests of foreign pages"] == 360
    assert outcome["notes"]["pages opened"] >= 3
