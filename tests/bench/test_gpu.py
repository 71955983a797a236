"""The GPU benchmark without a GPU: which entries are interleaved, and rows of entries that fail."""

import pytest
import torch

from saebench.bench import gpu, gpu_peers
from saebench.bench.gpu import PRODUCT, GpuRatio, GpuReport
from saebench.bench.gpu_ours import ENCODERS, PURSUIT, STEPS, TOPK
from saebench.bench.gpu_sizes import SIZES, Size
from saebench.bench.settings import BenchConfig
from saebench.cli.measuring import of_gpu

SECONDS = {PRODUCT: 1e-3, TOPK: 2e-3, "topk encode": 1.5e-3, PURSUIT: 20e-3}
SIZE = Size(name="S1", batch_size=8, d_in=4, d_sae=16, k=2)
ROWS_BND = torch.randn(2, 8, 4)


def makes(name):
    """An entry that returns its name when it is called."""
    return lambda size, rows_BND: lambda: name


def fails(error):
    def make(size, rows_BND):
        raise error

    return make


@pytest.fixture
def measuring(monkeypatch):
    """A measurement with fixed times, and the list of announced names."""
    monkeypatch.setattr(gpu, "timed", lambda once: lambda: SECONDS.get(once(), 10e-3))
    monkeypatch.setattr(gpu, "peak_gib", lambda once, calls: 0.5)
    monkeypatch.setattr(gpu, "product", makes(PRODUCT))
    announced = []
    return gpu._Measuring(SIZE, ROWS_BND, 1, announced.append), announced


def test_peers_are_interleaved_with_their_counterpart(measuring):
    run, announced = measuring
    run.measure_ours({name: makes(name) for name in ("topk encode", TOPK, "gradient step")})
    run.measure_ours({PURSUIT: makes(PURSUIT)})
    del announced[:]
    for name in ("plain torch encode", "plain torch step", gpu_peers.PURSUIT):
        run.measure_peer(name, makes(name))
    assert [sorted(announced[i : i + 2]) for i in range(0, len(announced), 4)] == [
        ["plain torch encode", "topk encode"],
        ["plain torch step", TOPK],
        sorted([PURSUIT, gpu_peers.PURSUIT]),
    ]
    rows = {row.name: row for row in run.rows}
    assert [row.name for row in run.rows].count(PRODUCT) == 1
    assert rows["plain torch step"].products == pytest.approx(10)
    assert (rows["plain torch encode"].memory_gib, rows["plain torch step"].memory_gib) == (None, 0.5)
    assert (rows[TOPK].goal_ms, rows[TOPK].met, rows[PURSUIT].met) == (1.35, False, False)
    ratios = {(ratio.slower, ratio.faster): ratio for ratio in run.ratios}
    assert (
        ratios["topk encode", PRODUCT].value == pytest.approx(1.5) and not ratios["topk encode", PRODUCT].met
    )
    beside = ratios["plain torch step", TOPK]
    assert (beside.value, beside.goal, beside.bound, beside.met) == (pytest.approx(5), 3.6, "at least", True)
    assert ratios[gpu_peers.PURSUIT, PURSUIT].met is None


def test_failed_entry_gets_row_with_reason_and_others_are_measured(measuring):
    run, _ = measuring
    run.measure_ours({"gradient step": fails(torch.OutOfMemoryError("none left")), TOPK: makes(TOPK)})
    run.measure_peer("a", fails(ImportError("cannot import b. Really")))
    run.measure_peer("c", makes("c"))
    rows = {row.name: row for row in run.rows}
    assert list(rows) == [PRODUCT, "gradient step", TOPK, "a", "c"]
    assert rows["gradient step"].reason == "OutOfMemoryError: none left"
    assert (rows["a"].reason, rows["a"].timing) == ("ImportError: cannot import b", None)
    assert rows["c"].timing is not None
    report = GpuReport(
        device="d", versions={}, settings={}, sizes=(SIZE,), rows=run.rows, ratios=run.ratios, commit=None
    )
    printed = of_gpu(report)
    assert "ImportError: cannot import b" in printed
    assert "c / topk step" in printed and "at least 3.6" in printed
    assert [row["met"] for row in report.as_json()["rows"]] == [None, None, False, None, None]


def test_all_entries_are_measured_except_pursuit_where_not_fused(monkeypatch):
    monkeypatch.setattr(gpu_peers, "STEPS", {name: make for name, (_, make) in gpu_peers._STEPS.items()})
    for size in SIZES:
        ours = [name for group in gpu._ours(size) for name in group]
        others = gpu._others(size)
        if size.only_topk:
            assert ours == [TOPK] and gpu_peers.PURSUIT not in others and "sae-lens topk step" in others
        else:
            assert sorted(ours) == sorted(ENCODERS | STEPS)
            assert set(others) == set(gpu_peers.ENCODERS) | set(gpu_peers.STEPS)
    # Per round: ours and the product in five groups, then each peer with one of ours. One round warms up.
    counted = 5 + 2 * (len(ENCODERS) + len(STEPS)) + 1 + 2 * (2 * (2 + 7) + 6)
    assert gpu.n_parts(BenchConfig(turns=4)) == 5 * counted


@pytest.mark.parametrize(
    ("bound", "goal", "met"),
    [("at most", 1.5, True), ("at most", 1.4, False), ("at least", 1.5, True), ("at least", 1.6, False)],
)
def test_goal_is_met_on_its_side_of_bound(bound, goal, met):
    ratio = GpuRatio(size="S1", slower="a", faster="b", value=1.5, goal=goal, bound=bound)
    assert ratio.met is met


@pytest.mark.parametrize("name", ["plain torch step", "plain torch encode"])
def test_plain_torch_step_lowers_loss_and_encode_picks_k(name):
    torch.manual_seed(0)
    once = (gpu_peers.STEPS | gpu_peers.ENCODERS)[name](SIZE, ROWS_BND)
    first = once()
    if name == "plain torch encode":
        assert first.values.shape == (8, 2) and (first.values >= 0).all()
    else:
        last = [once() for _ in range(200)][-2:]  # the same batch again
        assert last[1] < first


def test_missing_peer_is_listed_as_not_installed(monkeypatch):
    monkeypatch.setattr(gpu_peers, "MODULES", {"sae-lens": "no_such_module", "torch": "torch"})
    found = gpu_peers.versions()
    assert found["sae-lens"] == "not installed" and found["torch"].startswith(torch.__version__.split("+")[0])
