"""A tiny suite from end to end: its files, resuming, and errors."""

import json

import pytest

from saebench.cli import main
from saebench.core.errors import UserError
from saebench.synth import suite

TINY = {
    "data": ("zipf", "readout"),
    "architectures": ("topk", "gradient"),
    "seeds": 2,
    "tokens": 10_000,
    "quiet": True,
}
"""Two, two and ten SAEs of twenty steps each."""


def words(out, **settings):
    made = ["synth", "--out", str(out)]
    for name, value in {**TINY, **settings}.items():
        values = value if isinstance(value, tuple) else (value,)
        made += [f"--{name}" if value is True else f"--{name}={each}" for each in values]
    return made


def weights(out):
    return {path: path.read_bytes() for path in out.rglob("sae.safetensors")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("synth") / "out"
    assert main(words(out)) == 0
    return out


def test_suite_writes_runs_and_results(finished, capsys):
    capsys.readouterr()
    assert main([*words(finished), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((finished / "results.json").read_text())
    labels = [(score["data"], score["sae"]) for score in printed["scores"]]
    betas = [
        f"gradient-beta{beta} ({read})"
        for beta in ("0.3", "1", "3", "10")
        for read in ("plain", "proxy", "oracle")
    ]
    expected = [("readout", name) for name in ("topk", *betas)]
    assert labels == [("zipf", "topk"), ("zipf-constant", "topk"), *expected]
    assert all(len(values) == 2 for score in printed["scores"] for values in score["seeds"].values())
    topk = printed["scores"][0]
    assert topk["seeds"]["explained_variance"][0] != topk["seeds"]["explained_variance"][1]
    verdicts = {claim["claim"]: claim["verdict"] for claim in printed["claims"]}
    assert [v for c, v in verdicts.items() if c.startswith("feature-choice leaves")] == ["not tested"]
    assert {"holds", "does not hold"} >= {v for c, v in verdicts.items() if c.startswith("gradient")}
    assert {"date", "commit", "suite", "seeds"} <= set(printed["provenance"])


def test_markdown_has_table_per_data_set_and_each_claim(finished):
    text = (finished / "results.md").read_text()
    for name in ("zipf", "zipf-constant", "readout"):
        assert f"\n## {name} (k 8, 2 seeds, 500 test rows)\n" in text
    assert (
        text.count("\n| holds |") + text.count("\n| does not hold |") + text.count("\n| not tested |") == 16
    )
    assert str(finished) not in text
    assert "(oracle): latents are selected by the gradient of the loss, which depends on the labels" in text
    assert text.count("in mode oracle (which reads the labels)") == 4
    widths = {line.count(" | ") for line in text.splitlines() if line.startswith("| gradient-beta")}
    assert len(widths) == 1


def test_second_call_trains_only_deleted_runs_with_identical_bytes(finished, monkeypatch):
    before = weights(finished)
    with monkeypatch.context() as patched:
        patched.setattr(suite, "train_all", lambda plans: pytest.fail("trained again"))
        suite.synth(out=finished, **TINY)
    lost = finished / "zipf" / "runs" / "topk-seed1"
    for file in ("sae.json", "sae.safetensors"):
        (lost / file).unlink()
    for checkpoint in (lost / "checkpoints").iterdir():
        checkpoint.unlink()
    suite.synth(out=finished, **TINY)
    assert weights(finished) == before


def test_failed_training_is_reported_and_other_saes_are_measured(tmp_path, monkeypatch):
    def all_but_the_last(plans):
        real(plans[:-1])
        raise UserError("the last one diverged")

    real = suite.train_all
    monkeypatch.setattr(suite, "train_all", all_but_the_last)
    settings = {**TINY, "data": ("readout",), "architectures": ("topk", "mutual-choice")}
    report = suite.synth(out=tmp_path, **settings)
    assert report.troubles == ["readout: the last one diverged"]
    assert [score.n_seeds for score in report.scores] == [2, 1]
    assert "Failed: readout: the last one diverged" in (tmp_path / "results.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["troubles"] == report.troubles


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"tokens": 20_000}, "made with tokens 10000, but this call has 20000; choose another --out"),
        ({"data": ("zipf", "wood")}, 'Invalid value "wood" for --data'),
        ({"data": ("zipf", "zipf")}, "--data names the same value twice: zipf, zipf; name each once"),
        ({"architectures": ("sparse",)}, "--architectures sparse is not an SAE architecture; there is topk"),
        ({"seeds": 0}, "seeds is 0; it must be at least 1"),
        ({"tokens": 999}, "tokens is 999; it must be at least 10000"),
    ],
)
def test_invalid_settings_are_refused_with_one_sentence(finished, capsys, settings, sentence):
    assert main(words(finished, **settings)) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_run_with_other_architecture_settings_is_refused(finished):
    file = finished / "zipf" / "runs" / "topk-seed0" / "sae.json"
    before = file.read_text()
    file.write_text(before.replace('"k": 8', '"k": 7'))
    try:
        with pytest.raises(UserError, match="trained with other settings of topk; choose another --out"):
            suite.synth(out=finished, **TINY)
    finally:
        file.write_text(before)
