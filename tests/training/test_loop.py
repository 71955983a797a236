"""The training loop: it learns, repeats bit for bit, and refuses settings and data that cannot work."""

import csv
import dataclasses
import inspect
import json

import pytest
import torch

from saebench.activations.cache import open_cache
from saebench.activations.verifying import VerifiedColumn
from saebench.cli import main
from saebench.core.codes import SparseCodes
from saebench.core.errors import UserError
from saebench.runs.run import load
from saebench.saes.registry import ARCHITECTURES, architecture
from saebench.saes.topk import TopKSAE, TopKSpec
from saebench.training import loop, train
from saebench.training.settings import TrainConfig


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_trained_sae_is_in_the_units_of_the_cache(settings, sparse_rows):
    run = train(**settings | {"tokens": 600 * 128})
    lines = metrics_of(run.path)
    assert lines[-1]["fvu"] < 0.2 < lines[0]["fvu"]
    sae, x_ND = run.sae, sparse_rows[-200:]
    error = (x_ND - sae(x_ND)).square().sum() / (x_ND - x_ND.mean(0)).square().sum()
    assert abs(error - lines[-1]["fvu"]) < 0.1
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))


def test_run_directory_holds_weights_description_metrics_and_session(settings):
    run = train(**settings)
    assert [line["step"] for line in metrics_of(run.path)] == [7, 14, 21, 28, 35, 42, 49, 56, 60]
    with open(run.path / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [{k: float(v) for k, v in row.items()} for row in table] == metrics_of(run.path)
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["step-000000060.safetensors"]
    facts = json.loads((run.path / "run.json").read_text())
    assert facts["hook_name"] == "imported" and facts["sae"]["d_sae"] == 64 and facts["n_steps"] == 60
    assert load(run).spec == TopKSpec(d_sae=64, k=4)
    assert repr(run.sae) == "TopKSAE(d_in=16, d_sae=64, k=4)"
    assert repr(run) == f"Run({str(run.path)!r}: topk, d_sae=64, k=4)"


def test_two_runs_with_one_seed_agree_bit_for_bit_and_another_seed_does_not(settings, tmp_path, files_of):
    first, second = train(**settings), train(**settings | {"out": tmp_path / "second"})
    other = train(**settings | {"out": tmp_path / "other", "seed": 1})
    assert files_of(first.path) == files_of(second.path)
    assert files_of(first.path)["sae.safetensors"] != files_of(other.path)["sae.safetensors"]


def test_neither_logging_nor_checkpoints_change_the_result(settings, tmp_path, files_of):
    plain = train(**settings)
    chatty = train(
        **settings | {"out": tmp_path / "b", "log_every": 1, "checkpoint_every": 3, "tensorboard": True}
    )
    assert files_of(plain.path)["sae.safetensors"] == files_of(chatty.path)["sae.safetensors"]
    assert list((chatty.path / "tensorboard").iterdir())


def test_batches_of_one_row_have_no_fvu_and_the_metrics_are_json_all_the_same(settings, capsys):
    words = ["train", "--json"]
    for name, value in (settings | {"batch_size": 1, "tokens": 9}).items():
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert main(words) == 0
    lines = (settings["out"] / "metrics.jsonl").read_text().splitlines()
    told = [json.loads(line, parse_constant=refuse) for line in (*lines, capsys.readouterr().out)]
    assert len(told) == 3 and all(line["fvu"] is None and line["l0"] > 0 for line in told)


def test_the_config_objects_and_the_keywords_are_the_same_call(settings, tmp_path, files_of):
    first = train(**settings)
    own = {name: settings[name] for name in ("d_sae", "k")}
    rest = {name: value for name, value in settings.items() if name not in own} | {"out": tmp_path / "b"}
    second = train(TrainConfig(**rest), TopKSpec(**own))
    assert files_of(first.path) == files_of(second.path)
    cache = open_cache(rest.pop("cache"))
    third = train(cache, **rest | own | {"out": tmp_path / "c"})
    assert files_of(first.path) == files_of(third.path)
    for arguments, keywords in (
        ((cache, TopKSpec(**own)), rest),
        ((TrainConfig(cache=cache.path, **rest),), own),
    ):
        with pytest.raises(TypeError, match="keywords"):
            train(*arguments, **keywords)


def test_held_out_rows_are_never_trained_on(settings, make_cache, sparse_rows, tmp_path, files_of):
    """Other values in the held-out rows change nothing."""
    poisoned = sparse_rows.clone()
    poisoned[-300:] = 1e4
    cache = make_cache(tmp_path / "poisoned", poisoned)
    assert cache.held_out.sum() == 300
    clean, other = train(**settings), train(**settings | {"cache": cache.path, "out": tmp_path / "b"})
    assert files_of(clean.path)["sae.safetensors"] == files_of(other.path)["sae.safetensors"]


@pytest.mark.parametrize("coefficient", [1 / 32, 0.0])
def test_aux_fires_on_dead_latents_and_revives_them(settings, monkeypatch, coefficient):
    """Half of the encoder rows start so short that they are never picked; AuxK alone revives them."""
    initialize = TopKSAE.initialize

    def with_short_rows(self, sample, *, seed):
        initialize(self, sample, seed=seed)
        with torch.no_grad():
            self.W_enc_MD[32:] *= 1e-3

    monkeypatch.setattr(TopKSAE, "initialize", with_short_rows)
    train(
        **settings | {"tokens": 700 * 128, "aux_coefficient": coefficient, "dead_tokens": 1, "log_every": 10}
    )
    lines = metrics_of(settings["out"])
    most_dead = max(line["dead"] for line in lines)
    assert most_dead >= 25
    assert any(line["aux"] > 0 for line in lines) == (coefficient > 0)
    if coefficient:
        assert lines[-1]["dead"] <= most_dead // 2
    else:
        assert lines[-1]["dead"] >= 25


def test_dead_window_is_the_smaller_of_the_setting_and_a_tenth_of_the_run(settings, monkeypatch, tmp_path):
    seen = []
    count = TopKSAE.count_firing

    def spy(self, codes: SparseCodes):
        seen.append(self.dead_after)
        count(self, codes)

    monkeypatch.setattr(TopKSAE, "count_firing", spy)
    train(**settings)
    assert set(seen) == {50 * 128}
    seen.clear()
    train(**settings | {"out": tmp_path / "b", "tokens": 600 * 128})
    assert set(seen) == {60 * 128}
    seen.clear()
    train(**settings | {"out": tmp_path / "c", "tokens": 600 * 128, "dead_tokens": 55 * 128})
    assert set(seen) == {55 * 128}


@pytest.mark.parametrize("sampled", [65_536, 128])
def test_activations_that_are_not_finite_end_in_a_sentence(
    settings, make_cache, sparse_rows, tmp_path, monkeypatch, sampled
):
    """Also where the sample that begins the run did not meet them. Checksums are left out of the test."""
    monkeypatch.setattr(VerifiedColumn, "_verify", lambda *_: None)
    monkeypatch.setattr(loop, "SAMPLE_ROWS", sampled)
    cache = make_cache(tmp_path / "c", sparse_rows)
    path = next((cache.path / "hook" / "imported").iterdir())
    data = bytearray(path.read_bytes())
    data[-16 * 4 * 3000 : -16 * 4 * 3000 + 4] = b"\x00\x00\xc0\x7f"
    path.write_bytes(data)
    with pytest.raises(UserError, match="NaN or infinity"):
        train(**settings | {"cache": cache.path})


def test_divergence_ends_in_a_sentence_and_keeps_no_broken_checkpoint(settings):
    with pytest.raises(UserError, match=r"diverged.* step 2 .*batch 1.*lower --lr"):
        train(**settings | {"lr": 1e30, "grad_clip": 0, "warmup": 0})
    assert not (settings["out"] / "sae.json").exists()
    assert not list((settings["out"] / "checkpoints").glob("*"))


def test_what_overflows_at_once_is_not_blamed_on_the_learning_rate(
    settings, make_cache, sparse_rows, tmp_path, monkeypatch
):
    cache = make_cache(tmp_path / "huge", 1e30 * sparse_rows)
    with pytest.raises(
        UserError, match=r"diverged.* step 1 .*scale of the activations.*drop --no-normalize"
    ) as told:
        train(**settings | {"cache": cache.path, "normalize": False})
    assert "--lr" not in str(told.value)
    train(**settings | {"cache": cache.path, "out": tmp_path / "normalized"})
    loss = TopKSAE.loss
    monkeypatch.setattr(
        TopKSAE, "loss", lambda *a: dataclasses.replace(t := loss(*a), total=t.total * float("nan"))
    )
    with pytest.raises(UserError, match=r"step 1 .*look for outliers in the cache"):
        train(**settings | {"out": tmp_path / "spoilt"})


@pytest.mark.parametrize("first_bad", [55, 59])
def test_a_run_that_diverges_at_its_end_is_not_finished(settings, around_steps, first_bad):
    """Noticed at the last step alone; the weights are finite, since no bad step is applied."""

    def bad_at_the_end(take, rows, state, progress):
        bad = progress >= first_bad / 60
        return take(rows._replace(activations=rows.activations * (float("nan") if bad else 1.0)))

    around_steps(bad_at_the_end)
    patient = settings | {"log_every": 1000, "checkpoint_every": 1000}
    for resume in (False, True):
        with pytest.raises(UserError, match=rf"diverged.* at step {first_bad + 1} of"):
            train(**patient | {"resume": resume})
        assert not (settings["out"] / "sae.json").exists()
        assert not list(settings["out"].glob("checkpoints/*"))
    with pytest.raises(UserError, match="has not finished"):
        load(settings["out"])


def test_weights_that_overflow_in_the_last_step_are_not_saved(settings, around_steps):
    def overflow(take, rows, state, progress):
        output = take(rows)
        if progress >= 59 / 60:
            state.current.sae.b_dec.data.fill_(float("inf"))
        return output

    around_steps(overflow)
    with pytest.raises(UserError, match=r"diverged.* not finite after step 60 of .*lower --lr"):
        train(**settings)
    assert not (settings["out"] / "sae.json").exists()
    assert [p.name for p in settings["out"].glob("checkpoints/*")] == ["step-000000050.safetensors"]


@pytest.mark.parametrize("sae", [name for name in ARCHITECTURES if not architecture(name).uses_gradients])
def test_constant_activations_are_refused(settings, make_cache, tmp_path, sae):
    for value in (0.0, 1.0):
        cache = make_cache(tmp_path / f"flat{value}", torch.full((500, 4), value))
        for normalize in (True, False):
            with pytest.raises(UserError, match="all activations in the cache are equal"):
                train(**settings | {"cache": cache.path, "sae": sae, "normalize": normalize})
    train(**settings)  # the refusal left the directory free


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hook": "importd"}, "did you mean imported"),
        ({"k": 65}, "k is 65"),
        ({"sae": "topkk"}, "topkk"),
        ({"lr": -1.0}, "lr is -1"),
        ({"d_saee": 3}, "did you mean"),
        ({"cache": "nowhere"}, "nowhere"),
        ({"device": "cuda:7"}, "--device cuda:7"),
        ({"warmup": 0.9, "decay": 0.9}, "exceed"),
        ({"tokens": 100}, "one step takes batch_size = 128"),
    ],
)
def test_bad_settings_end_in_a_sentence_before_anything_is_written(settings, change, message):
    with pytest.raises(UserError, match=message):
        train(**settings | change)
    assert not settings["out"].exists()


def test_a_directory_is_refused_unless_it_is_this_run(settings, tmp_path, files_of):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(UserError, match=r"thesis\.tex"):
            train(**settings | {"resume": resume})
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "run" / "thesis.tex").unlink()
    train(**settings)
    before = files_of(settings["out"])
    with pytest.raises(UserError, match="already holds a finished run"):
        train(**settings)
    with pytest.raises(UserError, match="begun with --k 4 and this call says 5"):
        train(**settings | {"resume": True, "k": 5})
    train(**settings | {"resume": True})
    assert files_of(settings["out"]) == before


def test_resuming_on_other_activations_is_refused(settings, make_cache, sparse_rows, tmp_path):
    train(**settings)
    other = make_cache(tmp_path / "other", sparse_rows + 1)
    with pytest.raises(UserError, match="begun on another cache"):
        train(**settings | {"cache": other.path, "resume": True})


def test_help_in_a_notebook_names_every_setting():
    names = list(inspect.signature(train).parameters)
    assert names[:2] == ["cache", "out"] and {"lr", "d_sae", "k"} <= set(names)
    assert {"site", "hook", "target", "skip"} <= set(names) and not {"sites", "targets"} & set(names)
    assert all(f"    {name}: " in train.__doc__ for name in names if name not in ("settings", "hook"))


def test_each_session_records_its_device_and_kernels(settings):
    train(**settings)
    (line,) = (settings["out"] / "sessions.jsonl").read_text().splitlines()
    session = json.loads(line)
    device, kernels = ("cpu", "eager")
    if settings["device"] == "cuda":
        device, kernels = torch.cuda.get_device_name(), "fused"
    assert (session["device"], session["kernels"], session["torch"]) == (device, kernels, torch.__version__)
    assert session["first_step"] == 0 and session["last_step"] > 0
