"""The CPU benchmark at small sizes: the report, missing peers, and errors."""

import contextlib
import dataclasses
import io
import json
import sys

import pytest
import torch

from saebench.bench import cpu, steps
from saebench.bench.cpu import OURS, Ratio
from saebench.bench.peer import running_peer
from saebench.cli import main
from saebench.core.errors import UserError
from saebench.saes.base import Batch

SMALL = {"d_in": 16, "d_sae": 64, "k": 4, "batch_size": 64, "threads": 1, "turns": 1}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What the command prints and the JSON that it writes, without peers."""
    folder = tmp_path_factory.mktemp("bench")
    flags = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        words = ["--cpu", "--peers", str(folder), "--out", str(folder / "bench.json"), "--quiet", *flags]
        assert main(["bench", *words]) == 0
    return printed.getvalue(), json.loads((folder / "bench.json").read_text())


def test_without_peers_saelens_is_missing_and_saebench_is_measured(measured):
    printed, report = measured
    timed = {row["name"]: row for row in report["rows"] if row["timing"] is not None}
    assert set(timed) == {"encoder product", *(f"saebench {name}" for name in OURS)}
    for row in timed.values():
        assert 0 < row["timing"]["smallest"] <= row["timing"]["median"] <= row["timing"]["largest"]
        assert row["error"] is None or row["error"] < 1e-5
    missing = [row["name"] for row in report["rows"] if row["timing"] is None]
    assert missing == ["sae-lens topk", "sae-lens batchtopk", "sae-lens matching_pursuit"]
    assert report["versions"]["sae-lens"] == "not installed: make peers"
    assert printed.count("not installed: make peers") == 4
    for name in [*timed, *missing]:
        assert f"\n{name} " in printed


def test_ratios_and_gains_follow_from_times(measured):
    printed, report = measured
    medians = {row["name"]: row["timing"]["median"] for row in report["rows"] if row["timing"]}
    no_topk, no_pursuit, mutual = report["ratios"]
    assert no_topk["value"] is no_pursuit["value"] is no_topk["met"] is None
    value = medians["saebench mutual-choice"] / medians["saebench topk"]
    assert mutual["value"] == value and mutual["met"] == (value <= 1.3)
    assert [gain["d_sae"] for gain in report["sweep"]] == [64, 4]
    for gain in report["sweep"]:
        assert gain["gain"] == gain["separate"] / gain["together"] > 0
    assert "4 x 64 latents" in printed


def test_number_of_threads_is_restored(tmp_path):
    before = torch.get_num_threads()
    with cpu._threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("bound", "goal", "value", "met"),
    [
        ("at least", 3.5, 3.5, True),
        ("at least", 3.5, 3.4, False),
        ("at most", 1.3, 1.2, True),
        ("at most", 1.3, 1.4, False),
        ("at most", 1.3, None, None),
    ],
)
def test_goal_is_met_on_its_side_of_bound(bound, goal, value, met):
    assert Ratio(slower="a", faster="b", value=value, bound=bound, goal=goal).met is met


@pytest.mark.parametrize("name", OURS)
def test_error_is_relative_error_of_reconstruction(name, monkeypatch):
    rows_ND = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    sae, step = steps.step_of(name, rows_ND, batch_size=64, d_sae=64, k=4)
    step()
    batch = Batch(rows_ND[:50])
    assert steps.error_of(sae, batch) < 1e-5
    right = sae.loss

    def wrong(batch):
        terms = right(batch)
        return dataclasses.replace(terms, error=terms.error - 0.01 * (batch.x_ND - terms.error))

    monkeypatch.setattr(sae, "loss", wrong)
    assert steps.error_of(sae, batch) == pytest.approx(0.01, rel=1e-3)


def test_step_updates_weights_norms_and_counters():
    """The weights change, the decoder is normalized, and firing latents are counted."""
    rows_ND = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    sae, step = steps.step_of("topk", rows_ND, batch_size=64, d_sae=64, k=4)
    before = sae.W_dec.detach().clone()
    assert step() > 0
    assert not torch.equal(sae.W_dec, before)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    assert (sae.tokens_since_fired == 0).any()


def test_missing_gpu_or_broken_peers_are_refused_with_one_sentence(tmp_path, capsys):
    assert main(["bench"]) == 2
    assert "saebench bench --cpu" in capsys.readouterr().err
    with pytest.raises(UserError, match="make peers"), running_peer(tmp_path, threads=1):
        pass
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    with pytest.raises(UserError, match=r"sae_lens.*make peers"), running_peer(tmp_path, threads=1):
        pass


def test_unwritable_results_are_refused_before_measuring(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cpu, "_steps", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file" / "b.json"):
        assert main(["bench", "--cpu", "--out", str(out), "--quiet"]) == 2
        assert str(tmp_path) in capsys.readouterr().err


def test_goals_name_existing_entries():
    names = {f"saebench {name}" for name in OURS} | set(cpu._peer_names())
    assert {name for slower, faster, *_ in cpu.GOALS for name in (slower, faster)} <= names
