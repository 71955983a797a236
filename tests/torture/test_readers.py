"""Some seconds of the campaign of readers and hostile SQL; `make torture` runs more of them."""

from __future__ import annotations

from pathlib import Path

from tests.torture.outcome import Outcome
from tests.torture.readers import ask_hostile, read_while_published


def test_readers_see_one_generation_while_publishers_are_killed(tmp_path: Path) -> None:
    outcome = Outcome("readers", "answer")
    read_while_published(tmp_path, 0, 6, outcome, readers=2)
    assert outcome.attempts > 0
    assert outcome.notes["generations"] > 2
    assert not outcome.failures, "\n".join(outcome.failures)


def test_hostile_sql_ends_within_its_limits_and_leaves_no_process(tmp_path: Path) -> None:
    outcome = Outcome("hostile SQL", "query")
    ask_hostile(tmp_path, 1, 5, outcome)
    assert outcome.attempts > 1
    assert not outcome.failures, "\n".join(outcome.failures)
