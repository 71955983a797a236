from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture import kills


@pytest.mark.slow
def test_killed_commands_give_the_usual_result(folder: Path) -> None:
    found = kills.kill(folder, 0, 0, ["harvest", "train", "index"])
    assert found.failures == []


def test_another_result_after_a_kill_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill that the command survives with another result, here one that counts its runs."""
    results = iter(range(99))
    monkeypatch.setattr(kills, "result_of", lambda *_: next(results))
    monkeypatch.setattr(kills, "in_child", lambda task, *given: task(*given))
    found = kills.kill(folder, 0, 0, ["export"])
    assert len(found.failures) == 1
    assert found.failures[0].endswith("another result")
