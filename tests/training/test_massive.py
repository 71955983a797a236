"""Rows of massive norm do not ruin a training, and a training that failed says so in its run and report."""

from __future__ import annotations

import json

import pytest
import torch

import saebench as sb
from saebench.cli import main
from saebench.core.errors import UserError
from saebench.runs.run import Run
from saebench.training.settings import TrainConfig


def with_sinks(rows_ND: torch.Tensor, share: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows, some of them with 400 added in two dimensions; and which."""
    massive_N = torch.rand(len(rows_ND), generator=torch.Generator().manual_seed(7)) < share
    sunk_ND = rows_ND.clone()
    sunk_ND[massive_N, 3] += 400
    sunk_ND[massive_N, 11] += 400
    return sunk_ND, massive_N


def fvu(sae: sb.SAE, x_ND: torch.Tensor) -> float:
    with torch.no_grad():
        return float((x_ND - sae(x_ND)).square().sum() / (x_ND - x_ND.mean(0)).square().sum())


@pytest.mark.parametrize("sae", ["topk", "mutual-choice", "relu", "matching-pursuit"])
def test_ordinary_rows_are_explained_as_well_as_without_massive_rows(
    sae, settings, sparse_rows, make_cache, tmp_path, capsys
) -> None:
    sunk_ND, massive_N = with_sinks(sparse_rows)
    cache = make_cache(tmp_path / "cache", sunk_ND)
    settings |= {"sae": sae, "tokens": 250 * 128}
    made = sb.train(**settings | {"cache": cache, "out": tmp_path / "sunk"})
    assert "norm above 10 times the median" in capsys.readouterr().err
    plain = sb.train(**settings)
    ordinary_ND = sparse_rows[-300:][~massive_N[-300:]]
    assert 1 - fvu(made.sae, ordinary_ND) > 0.97 * (1 - fvu(plain.sae, ordinary_ND))
    assert json.loads((made.path / "run.json").read_text())["clipped"]["imported"]["limit"] > 40
    report = sb.evaluate(made, quiet=True)
    seen_N = massive_N[cache.held_out]
    expected = 1 - fvu(made.sae, sunk_ND[cache.held_out][~seen_N])
    assert report.explained_variance_ordinary == pytest.approx(expected, rel=1e-4)
    assert report.massive_rows == int(seen_N.sum()) > 0
    assert json.loads(made.eval_file().read_text())["warnings"][0].startswith("0.77% of the rows")


def test_no_clipping_keeps_massive_rows_and_says_what_they_do(
    settings, sparse_rows, make_cache, tmp_path, capsys
) -> None:
    cache = make_cache(tmp_path / "cache", with_sinks(sparse_rows)[0])
    made = sb.train(**settings | {"cache": cache, "clip_norm": 0})
    assert "an SAE learns little else; leave --clip-norm 0 out" in capsys.readouterr().err
    assert "clipped" not in json.loads((made.path / "run.json").read_text())
    report = sb.evaluate(made, quiet=True)
    assert report.explained_variance - report.explained_variance_ordinary > 0.1
    assert any("over all rows, but" in sentence for sentence in report.warnings)


def test_without_massive_rows_the_setting_changes_nothing(settings, tmp_path) -> None:
    made = [
        sb.train(**settings | {"out": tmp_path / str(value), "clip_norm": value}) for value in ("auto", 0, 50)
    ]
    weights = {(run.path / "sae.safetensors").read_bytes() for run in made}
    assert len(weights) == 1
    assert "clip_norm" not in json.loads((made[0].path / "run.json").read_text())["train"]
    assert not (made[0].path / "warnings.json").exists() and made[0].warnings() == []


def test_clipped_training_resumes_to_the_same_bytes_and_one_begun_before_goes_on_as_it_was(
    settings, sparse_rows, make_cache, tmp_path
) -> None:
    cache = make_cache(tmp_path / "cache", with_sinks(sparse_rows)[0])
    settings |= {"cache": cache}
    for name, more in (("now", {}), ("before", {"clip_norm": 0})):
        whole = sb.train(**settings | {"out": tmp_path / name} | more)
        again = Run(tmp_path / f"{name}-again")
        sb.train(**settings | {"out": again.path} | more)
        for file in ("sae.json", "sae.safetensors"):
            (again.path / file).unlink()
        again.checkpoints()[-1].unlink()
        if more:  # as a version without the setting has written it
            facts = json.loads((again.path / "run.json").read_text())
            del facts["train"]["clip_norm"]
            (again.path / "run.json").write_text(json.dumps(facts))
        sb.train(**settings | {"out": again.path, "resume": True})
        weights = [(run / "sae.safetensors").read_bytes() for run in (whole.path, again.path)]
        assert weights[0] == weights[1]


def test_each_site_of_a_crosscoder_and_transcoder_has_its_own_limit(settings, sparse_rows, tmp_path) -> None:
    sunk_ND, _ = with_sinks(sparse_rows)
    source = sb.ModuleSource(
        torch.nn.ModuleDict({"a": torch.nn.Identity(), "b": torch.nn.Identity()}),
        ["a", "b"],
        [{"plain": sparse_rows, "sunk": sunk_ND}],
        forward=lambda module, batch: (module["a"](batch["plain"]), module["b"](batch["sunk"])),
        name="two",
    )
    cache = sb.harvest(source, out=tmp_path / "cache", dtype="fp32", quiet=True)
    settings |= {"cache": cache}
    for number, more in enumerate(
        ({"crosscoder": True}, {"hook": "a", "target": "b"}, {"hook": "b", "target": "a"})
    ):
        made = sb.train(**settings | {"out": tmp_path / str(number)} | more)
        assert set(json.loads((made.path / "run.json").read_text())["clipped"]) == {"b"}
        assert made.sae.W_dec.isfinite().all() and not any("worse" in w for w in made.warnings())


def test_a_multiple_that_would_change_ordinary_rows_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="would change ordinary rows"):
        TrainConfig(cache=tmp_path, out=tmp_path, clip_norm=0.5)


def test_absurd_learning_rate_ends_with_a_warning_in_run_and_report(settings, capsys) -> None:
    made = sb.train(**settings | {"lr": 1000.0})
    said = capsys.readouterr().err
    assert "reconstructs worse than the mean activation does" in said and "lower --lr (now 1e+03)" in said
    assert any("worse than the mean" in sentence for sentence in made.warnings())
    report = sb.evaluate(made, quiet=True)
    assert report.explained_variance < 0 and made.warnings()[0] in report.warnings
    assert any("explained variance is -" in sentence for sentence in report.warnings)
    assert main(["eval", str(made.path), "--quiet"]) == 0
    shown = capsys.readouterr()
    assert "worse than the mean" in shown.out


def test_training_without_an_active_latent_says_so(settings, capsys) -> None:
    made = sb.train(**settings | {"sae": "relu", "k": 1, "lr": 30.0})
    said = " ".join(made.warnings())
    assert "active" in said or "dead" in said or "worse" in said
