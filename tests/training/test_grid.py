"""Sweeps: every SAE ends with the bytes of a training of its own, and errors stop one SAE only."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from saebench.activations.loader import Loader
from saebench.core.errors import UserError
from saebench.training import sweep, train
from saebench.training.grid import parse_grid, plan, settle, words_of

GRID = {"k": [3, 4], "lr": [1e-3, 3e-3]}


@pytest.fixture
def settings(settings):
    """As those of a training, without what the sweeps of this file vary."""
    return {name: value for name, value in settings.items() if name not in ("k", "lr")}


def without_settings(files):
    """All bytes but those of run.json, in which the cache and the order may be written differently."""
    return {name: content for name, content in files.items() if name != "run.json"}


def test_each_sae_has_the_bytes_of_a_training_of_its_own(settings, tmp_path, files_of):
    out = tmp_path / "runs"
    runs = sweep(GRID, **settings | {"out": out})
    assert [run.path.name for run in runs] == ["k3-lr0.001", "k3-lr0.003", "k4-lr0.001", "k4-lr0.003"]
    for run in runs:
        facts = json.loads((run.path / "run.json").read_text())
        own = {"k": facts["sae"]["k"], "lr": facts["train"]["lr"], "out": tmp_path / run.path.name}
        assert files_of(train(**settings | own).path) == files_of(run.path)


def test_seeds_of_one_sweep_share_the_order_of_the_first(settings, tmp_path, files_of):
    runs = sweep({"seed": [5, 6]}, **settings | {"out": tmp_path / "runs"})
    alone = [
        train(**settings | {"seed": seed, "order_seed": 5, "out": tmp_path / str(seed)}) for seed in (5, 6)
    ]
    assert [files_of(run.path) for run in runs] == [files_of(run.path) for run in alone]
    first = train(**settings | {"seed": 5, "out": tmp_path / "plain"})
    assert without_settings(files_of(first.path)) == without_settings(files_of(alone[0].path))
    weights = [run.sae.W_dec for run in runs]
    assert not torch.equal(*weights)


def test_every_batch_is_read_once(settings, tmp_path, monkeypatch):
    read = []
    gather = Loader._gather
    monkeypatch.setattr(
        Loader, "_gather", lambda self, rows_N: read.append(rows_N.tolist()) or gather(self, rows_N)
    )
    train(**settings)
    alone = sorted(read)
    read.clear()
    sweep(GRID, **settings | {"out": tmp_path / "runs"})
    assert sorted(read) == alone


def test_diverging_sae_does_not_stop_the_others(settings, tmp_path, files_of, capsys):
    grid = {"lr": [1e-3, 1e30, 3e-3]}
    bad = settings | {"out": tmp_path / "runs", "grad_clip": 0, "warmup": 0}
    with pytest.raises(UserError, match=r"diverged.* step 2 of .*lr1e\+30.*\(2 others finished\)"):
        sweep(grid, **bad)
    assert "lr1e+30" in capsys.readouterr().err
    for lr in (1e-3, 3e-3):
        alone = train(**bad | {"lr": lr, "out": tmp_path / str(lr)})
        assert files_of(alone.path) == files_of(tmp_path / "runs" / f"lr{lr}")
    assert not (tmp_path / "runs" / "lr1e+30" / "sae.json").exists()


def test_sae_that_diverges_at_the_last_step_is_not_finished(settings, tmp_path, around_steps):
    def bad_at_the_end(take, rows, state, progress):
        bad = state.spec.k == 4 and progress >= 59 / 60
        return take(rows._replace(activations=rows.activations * (float("nan") if bad else 1.0)))

    around_steps(bad_at_the_end)
    with pytest.raises(UserError, match=r"diverged.* step 60 of .*k4.*\(1 others finished\)"):
        sweep({"k": [3, 4]}, **settings | {"out": tmp_path / "runs"})
    assert [run.name for run in (tmp_path / "runs").iterdir() if (run / "sae.json").exists()] == ["k3"]


def test_resumed_from_checkpoints_of_different_steps_it_ends_with_the_same_bytes(
    settings, tmp_path, files_of, stop_after
):
    """One SAE is at step 40, one at 30, one finished, one not begun: as a killed process leaves them."""
    sweep(GRID, **settings | {"out": tmp_path / "whole"})
    expected = {run.name: files_of(run) for run in (tmp_path / "whole").iterdir()}
    runs = tmp_path / "runs"
    for name, stop in (("k3-lr0.001", 40), ("k3-lr0.003", 30)):
        with stop_after(stop, RuntimeError("stopped")):
            train(**settings | {"out": runs / name, **_own(tmp_path / "whole" / name)})
    shutil.copytree(tmp_path / "whole" / "k4-lr0.001", runs / "k4-lr0.001")
    sweep(GRID, **settings | {"out": runs, "resume": True})
    assert {run.name: files_of(run) for run in runs.iterdir()} == expected
    sweep(GRID, **settings | {"out": runs, "resume": True})  # all finished: nothing to do
    with pytest.raises(UserError, match="add --resume"):
        sweep(GRID, **settings | {"out": runs})


def _own(run: Path):
    facts = json.loads((run / "run.json").read_text())
    return {"k": facts["sae"]["k"], "lr": facts["train"]["lr"]}


@pytest.mark.parametrize(
    ("grid", "sentence"),
    [
        ({"tokens": [1e5, 2e5]}, "cannot vary 'tokens' in one pass"),
        ({"d_sea": [1, 2]}, "cannot vary 'd_sea'"),
        ({"k": []}, "give a list of values"),
        ({"k": "16"}, "give a list of values"),
        ({"k": 5}, "gives k as 5; give a list of values"),
        ({"k": (n for n in (16, 32))}, "give a list of values"),
        (5, "the grid is 5; give settings and their values"),
        ({"k": [16, 16]}, "twice"),
        ({"k": [16, "many"]}, "'k' in .* is 'many'"),
        ({"k": [16, 65]}, "d_sae is only 64"),
        ({"sae": ["topk", "topkk"]}, "'topkk' is not an SAE architecture"),
    ],
)
def test_bad_grids_end_in_a_sentence_before_anything_is_written(settings, tmp_path, grid, sentence):
    with pytest.raises(UserError, match=sentence):
        sweep(grid, **settings | {"out": tmp_path / "runs"})
    assert not (tmp_path / "runs").exists()


def test_a_setting_that_an_architecture_lacks_does_not_multiply_its_runs(settings, tmp_path):
    grid = {"sae": ["topk", "gradient"], "beta": [1, 2], "seed": [0, 1]}
    plans = plan({"cache": "c", "out": "o", "tokens": 5000}, grid, source="here")
    assert [config.out.name for config, _ in plans] == [
        "topk-seed0",
        "topk-seed1",
        "gradient-beta1-seed0",
        "gradient-beta1-seed1",
        "gradient-beta2-seed0",
        "gradient-beta2-seed1",
    ]
    runs = sweep({"sae": ["topk", "relu"], "revival": [0.0, 0.1]}, **settings | {"out": tmp_path / "runs"})
    names = ["topk", "relu-revival0.0", "relu-revival0.1"]
    assert [run.path.name for run in runs] == names
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(names)


@pytest.mark.parametrize(
    "grid",
    [
        {"k": ["2", "2.0"]},
        {"k": [2, 2.0]},
        {"lr": ["1e-3", "0.001"]},
        {"sae": ["batchtopk", "mutual-choice"]},
    ],
)
def test_one_training_in_two_spellings_is_refused(grid):
    (name, (first, second)) = next(iter(grid.items()))
    with pytest.raises(UserError, match=f"one training as {name}={first} and as {name}={second}; name each"):
        plan({"cache": "c", "out": "o", "tokens": 5000}, grid, source="here")


def test_whole_numbers_of_a_sweep_are_written_as_those_of_flags():
    plans = plan({"cache": "c", "out": "o", "tokens": 5000}, parse_grid(["d_sae=4e1,50"]), source="here")
    assert [(config.out.name, spec.d_sae) for config, spec in plans] == [("d-sae40", 40), ("d-sae50", 50)]


def test_a_value_beside_values_of_the_sweep_is_refused(settings, tmp_path):
    with pytest.raises(UserError, match="k is 4 and, in the sweep, 2, 4; leave one of the two out"):
        sweep({"k": [2, 4]}, **settings | {"out": tmp_path / "runs", "k": 4})
    with pytest.raises(UserError, match="write its values into the grid"):
        sweep({"lr": [1e-3]}, **settings | {"out": tmp_path / "runs", "sweep": ("k=2,4",)})


def test_a_flag_wins_over_a_settings_file_whichever_of_the_two_sweeps():
    file = {"k": 8, "sae": "relu", "sweep": ["lr=1e-3,2e-3", "d_sae=64,128"]}
    assert settle(file, {}) == {**file, "sweep": ("lr=1e-3,2e-3", "d_sae=64,128")}
    assert settle(file, {"d_sae": 32}) == {**file, "d_sae": 32, "sweep": ("lr=1e-3,2e-3",)}
    assert settle(file, {"sweep": ("k=2,4",)}) == {"sae": "relu", "sweep": ("k=2,4",)}
    assert settle({"sweep": "sae=topk,relu"}, {"sae": "gated"}) == {"sae": "gated", "sweep": ()}


def test_sweep_words_are_parsed_into_a_grid():
    assert parse_grid(["k=16, 32", "d-sae=64"]) == {"k": ["16", "32"], "d_sae": ["64"]}
    plans = plan({"cache": "c", "out": "o", "tokens": 5000}, parse_grid(["k=16,32"]), source="here")
    assert [(config.out, spec.k) for config, spec in plans] == [(Path("o/k16"), 16), (Path("o/k32"), 32)]
    assert words_of({"sweep": "k=1,2"}) == ("k=1,2",) and words_of({}) == ()
    for damaged in ([1], 1, {"k": 1}):
        with pytest.raises(UserError, match=r"sweep is .*; give text like"):
            words_of({"sweep": damaged})
    for words in (["k"], ["k="], ["=3"], ["k=1,,2"], ["k=1,1"], ["k=1", "k=2"]):
        with pytest.raises(UserError, match="--sweep"):
            parse_grid(words)


def test_train_refuses_a_sweep(settings):
    with pytest.raises(UserError, match=r"saebench\.sweep"):
        train(**settings, sweep=("k=1,2",))
