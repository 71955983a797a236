"""MetricsLog reads each complete line once, also while the file is being written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saebench.core.errors import UserError
from saebench.runs.metrics_log import MetricsLog, read_metrics, read_sessions

LINES = st.lists(st.fixed_dictionaries({"fvu": st.floats(0, 1), "l0": st.integers(0, 99)}), max_size=12)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(lines=LINES, cuts=st.lists(st.integers(0, 400), max_size=6))
def test_complete_lines_are_read_once_while_file_is_written(
    tmp_path: Path, lines: list[dict[str, float]], cuts: list[int]
) -> None:
    numbered = [{"step": step, **line} for step, line in enumerate(lines)]
    content = "".join(json.dumps(line) + "\n" for line in numbered).encode()
    path = tmp_path / "metrics.jsonl"
    path.unlink(missing_ok=True)
    path.touch()
    log, seen, written = MetricsLog(tmp_path), 0, 0
    for stop in [*sorted(cut for cut in cuts if cut < len(content)), len(content)]:
        with open(path, "ab") as file:
            file.write(content[written:stop])
        written = stop
        seen += log.update()
        assert log.lines == numbered[:seen]
        assert seen == content[:stop].count(b"\n")
    assert log.lines == numbered


def test_truncated_or_replaced_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    log = MetricsLog(tmp_path)
    log.update()
    path.write_text('{"step": 1}\n')  # shorter, as after a resume from a checkpoint
    log.update()
    assert log.lines == [{"step": 1}]
    other = tmp_path / "new"
    other.write_text('{"step": 7}\nnonsense\n[1]\n{"step": 8}\n')
    other.replace(path)
    log.update()
    assert [line["step"] for line in log.lines] == [7, 8]


def test_missing_metrics_raise_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no metrics.jsonl; name a run directory"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step"')
    with pytest.raises(UserError, match="no line yet; wait"):
        read_metrics(tmp_path)
    assert read_sessions(tmp_path) == []
    (tmp_path / "sessions.jsonl").write_text('{"seconds": 1}\n{"sec')
    assert read_sessions(tmp_path) == [{"seconds": 1}]
