"""``compare`` on evaluations with known numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from saebench.cli import main
from saebench.core.errors import UserError
from saebench.evaluation.compare import compare

REPORT = {
    "sae": "topk", "d_sae": 64, "k": 4, "hook_name": "h", "n_tokens": 100, "rows": "held-out",
    "cache_hash": "c", "l0": 4.0, "fvu": 0.5, "explained_variance": 0.5, "dead_fraction": 0.25,
    "ce_loss_score": 0.9, "ce_delta": 0.1, "kl": 0.2, "n_tokens_model": 90,
}  # fmt: skip


def write(run: Path, *, file: str = "eval.json", seed: int = 0, beta: float = 1.0, **report: object) -> Path:
    run.mkdir(exist_ok=True)
    (run / file).write_text(json.dumps(REPORT | report))
    sae = {"name": (REPORT | report)["sae"], "k": (REPORT | report)["k"], "beta": beta}
    facts = {"format_version": 1, "train": {"seed": seed, "lr": 0.1}, "sae": sae, "cache_hash": "c"}
    (run / "run.json").write_text(json.dumps(facts))
    return run


def test_seeds_share_one_row_and_each_inference_mode_has_its_own(tmp_path: Path) -> None:
    runs = [write(tmp_path / f"s{i}", seed=i, fvu=fvu) for i, fvu in enumerate((0.4, 0.5, 0.6))]
    runs.append(write(tmp_path / "wide", k=8))
    gradient = write(tmp_path / "g", sae="gradient", inference="plain")
    runs.append(write(gradient, sae="gradient", inference="oracle", file="eval-oracle.json"))
    made = compare(runs=tuple(runs))
    assert [(row.label, row.k, len(row.runs)) for row in made.rows] == [
        ("gradient, oracle (sees the next tokens)", 4, 1), ("gradient, plain", 4, 1),
        ("topk", 4, 3), ("topk", 8, 1),
    ]  # fmt: skip
    topk = made.rows[2]
    assert topk.mean["fvu"] == pytest.approx(0.5) and topk.sd["fvu"] == pytest.approx(0.1)
    assert made.rows[3].sd["fvu"] is None
    assert not made.warnings


def test_labels_include_settings_that_differ_within_an_architecture(tmp_path: Path) -> None:
    runs = [write(tmp_path / f"b{beta}", sae="gradient", beta=beta) for beta in (0.3, 3.0)]
    made = compare(runs=(*runs, write(tmp_path / "t", beta=7.0), write(tmp_path / "t8", beta=7.0, k=8)))
    assert [row.label for row in made.rows] == ["gradient, beta 0.3", "gradient, beta 3.0", "topk", "topk"]


def test_run_named_by_several_paths_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = write(Path("a"))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    made = compare(runs=(run, tmp_path / "a", Path("b/../a"), Path("link")))
    assert [row.runs for row in made.rows] == [("a",)]
    assert made.rows[0].sd["fvu"] is None and not made.warnings


def test_runs_with_equal_settings_and_seed_count_once(tmp_path: Path) -> None:
    runs = [
        write(tmp_path / name, seed=seed, fvu=fvu)
        for name, seed, fvu in (("a", 0, 0.4), ("b", 1, 0.6), ("copy", 0, 0.4))
    ]
    made = compare(runs=tuple(runs))
    assert [row.runs for row in made.rows] == [(str(runs[0]), str(runs[1]))]
    assert made.rows[0].mean["fvu"] == pytest.approx(0.5)
    assert made.warnings == (f"{runs[2]} has the same settings and seed as {runs[0]} and is left out",)


def test_differing_measurements_give_warnings(tmp_path: Path) -> None:
    runs = (write(tmp_path / "a"), write(tmp_path / "b", k=8, n_tokens=7, rows="all", kl=None))
    made = compare(runs=runs)
    assert len(made.warnings) == 2
    assert any("number of rows" in text for text in made.warnings)
    assert made.rows[1].mean["kl"] is None


def test_written_files_match_printed_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write(tmp_path / f"r{k}", k=k, l0=float(k), fvu=1 / k) for k in (2, 4, 8)]
    out = tmp_path / "out"
    assert main(["compare", *map(str, runs), "--out", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "compare.json").read_text())
    html = (out / "compare.html").read_text(encoding="utf-8")
    assert "cdn" not in html.split("</head>")[0] and "L0 at inference" in html
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    figure = compare(runs=tuple(runs)).figure()
    curves = {curve.yaxis: (list(curve.x), list(curve.y)) for curve in figure.data}
    assert curves["y"] == ([2.0, 4.0, 8.0], [0.5, 0.25, 0.125])
    assert len(curves) == 4


def test_missing_browser_gives_one_sentence_and_keeps_html(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import plotly.graph_objects as go

    def no_browser(*_: object, **__: object) -> bytes:
        raise RuntimeError("Kaleido requires Google Chrome\nto be installed.")

    monkeypatch.setattr(go.Figure, "to_image", no_browser)
    with pytest.raises(UserError, match=r"requires Google Chrome to be installed.*saebench\[png\]"):
        compare(runs=(write(tmp_path / "a"),), out=tmp_path / "out")
    assert (tmp_path / "out" / "compare.html").exists()


def test_missing_or_damaged_evaluations_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="run saebench eval"):
        compare(runs=(tmp_path / "empty",))
    with pytest.raises(UserError, match="no run was named"):
        compare(runs=())
    write(tmp_path / "a")
    (tmp_path / "a" / "eval.json").write_text("[1]")
    with pytest.raises(UserError, match=r"eval.json is (damaged|not an evaluation)"):
        compare(runs=(tmp_path / "a",))
    for damage in ({"l0": "many"}, {"kl": [1]}, {"n_tokens": None}, {"sae": 3}):
        write(tmp_path / "a")
        (tmp_path / "a" / "eval.json").write_text(json.dumps(REPORT | damage))
        with pytest.raises(UserError, match=r"eval.json is (damaged|not an evaluation)"):
            compare(runs=(tmp_path / "a",))
    facts = json.loads((write(tmp_path / "a") / "run.json").read_text())
    for name in ("train", "sae", "cache_hash"):
        (tmp_path / "a" / "run.json").write_text(json.dumps({**facts, name: None}))
        with pytest.raises(UserError, match=f"damaged: {name} is None"):
            compare(runs=(tmp_path / "a",))
