"""Progress: nothing when quiet, a bar on a terminal, plain lines elsewhere, events for programs."""

from __future__ import annotations

import io
import json
import sys

import pytest

from saebench.core import progress as module
from saebench.core.progress import Snapshot, progress, send_events


def work(**options: object) -> None:
    with progress("harvest", total=200, unit="tok", **options) as bar:  # type: ignore[arg-type]
        bar.update(50)
        bar.update(150, "loss 1.5")


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    work(quiet=True)
    assert capsys.readouterr() == ("", "")


def test_elsewhere_a_plain_line_ends_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    work()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("harvest: 200/200 tok (100%)")
    assert err.endswith("  loss 1.5\n")
    assert err.count("\n") == 1
    assert "\r" not in err


def test_lines_come_at_intervals_with_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 3.0, 10.0, 10.0, 3725.0, 3725.0, 3725.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with progress("train", total=1100, unit="tok", initial=100) as bar:
        bar.update(50)
        bar.update(50)
        bar.update(100)
    assert capsys.readouterr().err.splitlines() == [
        "train: 200/1,100 tok (18%)  10 tok/s, 0:10 so far, 1:30 left",
        "train: 300/1,100 tok (27%)  0 tok/s, 1:02:05 so far, 4:08:20 left",
        "train: 300/1,100 tok (27%)  0 tok/s, 1:02:05 so far, 4:08:20 left",
    ]


def test_nothing_to_do_divides_by_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("index", total=0, unit="tok"):
        pass
    assert capsys.readouterr().err.startswith("index: 0/0 tok (0%)")


def test_work_that_fails_does_not_claim_to_have_ended(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with progress("index", total=5, unit="tok") as bar:
            bar.update(1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    work()
    err = capsys.readouterr().err
    assert "\r" in err
    assert "200/200" in err
    assert "loss 1.5" in err


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Where this process sends events, for one test."""
    monkeypatch.setattr(module, "_events", None)
    stream = io.StringIO()
    send_events(stream)
    return stream


def test_a_process_that_sends_events_writes_json_lines_and_shows_nothing(
    stream: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    work()
    work(quiet=True)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["done"] for event in events] == [0, 200, 0, 200]
    assert {event.pop("event") for event in events} == {"progress"}
    last = Snapshot(**events[1])
    assert (last.label, last.total, last.unit, last.note) == ("harvest", 200, "tok", "loss 1.5")
    assert last.share == 1.0
    assert capsys.readouterr() == ("", "")


def test_events_of_long_work_come_at_intervals(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_EVENTS", 0.0)
    with progress("train", total=3, unit="step", initial=1) as bar:
        bar.update(1)
        bar.update(1)
    done = [json.loads(line)["done"] for line in stream.getvalue().splitlines()]
    assert done == [1, 2, 3, 3]
