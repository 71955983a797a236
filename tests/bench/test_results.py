"""The tables in docs/performance.md show the newest results of the GPU benchmark."""

import copy
import json
from pathlib import Path

import pytest

from saebench.bench import results
from saebench.bench.gpu import GpuRatio, GpuReport, GpuRow
from saebench.bench.gpu_sizes import Size
from saebench.bench.timing import Timing
from saebench.core.errors import UserError
from saebench.core.files import write_json_atomic

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / results.PAGE).read_text(encoding="utf-8")


def timing(milliseconds):
    seconds = milliseconds / 1e3
    return Timing(median=seconds, smallest=seconds, largest=seconds, calls=2)


def report(date="2026-01-02T03:04:05+00:00"):
    sizes = tuple(
        Size(name=name, batch_size=8192, d_in=8 * i, d_sae=64 * i, k=i) for i, name in ((1, "S1"), (2, "S2"))
    )
    rows = [
        GpuRow(size="S1", name="topk step", timing=timing(1.25), products=2.5, goal_ms=1.35),
        GpuRow(size="S1", name="slow | step", timing=timing(123.4), products=246.8),
        GpuRow(size="S2", name="topk step", timing=timing(10), products=3, goal_ms=9.3),
        GpuRow(size="S2", name="slow | step", reason="OutOfMemoryError: none left"),
    ]
    ratio = GpuRatio(size="S1", slower="slow", faster="topk", value=3.5, goal=3.6, bound="at least")
    return GpuReport(
        device="a card",
        versions={"torch": "2", "saebench": "1", "sae-lens": "6", "other": "not installed"},
        settings={}, sizes=sizes, rows=rows, ratios=[ratio], date=date, commit="abc",
    ).as_json()  # fmt: skip


def test_performance_page_shows_newest_results():
    path = results.newest(ROOT / results.RESULTS)
    made = "" if path is None else results.render(json.loads(path.read_text(encoding="utf-8")))
    assert results.rewrite(PAGE, made) == PAGE, "run python -m saebench.bench.results"


def test_render_shows_every_row_and_ratio():
    lines = results.render(report()).splitlines()
    assert lines[0].startswith(
        "One a card, 2026-01-02, commit `abc`; saebench 1, torch 2, sae-lens 6. Batches"
    )
    assert "|  | d_in 8, d_sae 64, k 1 | d_in 16, d_sae 128, k 2 |" in lines
    assert "| topk step | 1.25 (2.50; at most 1.35 ms: met) | 10 (3.00; at most 9.3 ms: missed) |" in lines
    assert "| slow \\| step | 123 (246.80) | OutOfMemoryError: none left |" in lines
    assert "| slow / topk | 3.50 (at least 3.6: missed) |  |" in lines


def test_newest_results_replace_old_tables(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n"
    (tmp_path / results.PAGE).parent.mkdir()
    (tmp_path / results.PAGE).write_text(text)
    with pytest.raises(UserError, match="no JSON in"):
        results.main([])
    (tmp_path / results.RESULTS).mkdir(parents=True)
    newer, older = report("2026-02-01T00:00:00+00:00"), report("2026-01-31T00:00:00+00:00")
    older["device"] = "an older card"
    write_json_atomic(tmp_path / results.RESULTS / "a.json", newer)
    write_json_atomic(tmp_path / results.RESULTS / "b.json", older)
    for _ in range(2):
        results.main([])
        made = (tmp_path / results.PAGE).read_text()
        assert made == f"before\n{results.BEGIN}\n{results.render(newer)}\n{results.END}\nafter\n"
    results.main([str(results.RESULTS / "b.json")])
    assert "an older card" in (tmp_path / results.PAGE).read_text()


@pytest.mark.parametrize(
    "text", ["", results.BEGIN, f"{results.END}{results.BEGIN}", 2 * (results.BEGIN + results.END)]
)
def test_page_without_markers_is_refused(text):
    with pytest.raises(UserError, match="once each"):
        results.rewrite(text, "x")


def test_json_that_is_not_a_report_is_refused(tmp_path):
    wrong = copy.deepcopy(report())
    del wrong["ratios"]
    write_json_atomic(tmp_path / "a.json", wrong)
    with pytest.raises(UserError, match=r"a\.json has no results"):
        results.newest(tmp_path)
