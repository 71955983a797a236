"""Some seconds of the campaigns of damaged files and full disks; `make torture` runs more of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from saebench.core.errors import UserError
from tests.torture.damaged_files import fuzz
from tests.torture.full_disks import meet


def test_damaged_files_are_read_equally_or_refused_in_one_line(folder: Path) -> None:
    outcome = fuzz(folder, seed=0, seconds=0)
    assert not outcome.failures, "\n".join(outcome.failures)


def test_commands_on_full_disks_are_refused_in_one_line_and_run_again(folder: Path) -> None:
    outcome = meet(folder, seed=0, seconds=0, names=["import", "export", "store export delphi"])
    assert outcome.attempts >= 3
    assert not outcome.failures, "\n".join(outcome.failures)


@pytest.mark.parametrize("hostile", ["a\nb\x1b[31m\ud800\u202ec", "x" * 10_000])
def test_values_of_files_cannot_break_a_sentence(hostile: str) -> None:
    text = str(UserError(f"the value {hostile} is wrong"))
    assert "\n" not in text and text.encode() and len(text) < 4000
