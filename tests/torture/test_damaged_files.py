"""A few seconds of the campaign of damaged files; `make torture` runs more of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture.damaged_files import fuzz


def test_damaged_files_are_read_equally_or_refused_in_one_line(tmp_path: Path) -> None:
    outcome = fuzz(tmp_path, seed=0, seconds=2)
    assert outcome.attempts > 20
    assert not outcome.failures, "\n".join(outcome.failures)


@pytest.mark.parametrize("number", range(2))
def test_names_and_values_of_files_cannot_break_a_sentence(number: int) -> None:
    from saebench.core.errors import UserError

    hostile = ["a\nb\x1b[31m\ud800\u202ec", "x" * 10_000][number]
    text = str(UserError(f"the value {hostile} is wrong"))
    assert "\n" not in text and text.encode() and len(text) < 4000
