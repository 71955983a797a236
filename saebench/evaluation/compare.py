"""``compare``: the evaluations of several runs in one table and one Pareto plot."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.core.errors import UserError
from saebench.core.files import (
    atomic_file,
    remove_dead,
    require_writable,
    write_bytes_atomic,
    write_json_atomic,
)
from saebench.core.settings import accepts_settings
from saebench.evaluation.report import inference_label
from saebench.evaluation.settings import CompareConfig
from saebench.runs.layout import read_evaluation
from saebench.runs.run import Run

if TYPE_CHECKING:
    import plotly.graph_objects as go

MEASURES = (
    "l0",
    "fvu",
    "explained_variance",
    "ce_loss_score",
    "ce_delta",
    "kl",
    "dead_fraction",
    "picks_changed",
)
PLOTTED = {
    "fvu": "FVU",
    "ce_loss_score": "CE loss score",
    "kl": "KL(clean || spliced), nats",
    "dead_fraction": "dead latents, share",
}
SIZE = (1100, 800)
_MEASURED_ON = ("inference", "n_tokens", "n_tokens_model")
_NOT_OF_THE_KIND = (
    "seed", "order_seed", "cache", "device", "memory", "checkpoint_every", "log_every",
    "tensorboard", "wandb",
)  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """Runs that differ only in their seeds, with the mean and deviation of each measure."""

    label: str
    """Architecture, the settings other than d_sae and k in which the compared runs of this architecture
    differ, and the inference mode if it has several."""
    sae: str
    inference: str | None
    d_sae: int
    k: int
    n_tokens: int
    """Rows on which each run was measured."""
    runs: tuple[str, ...]
    """Paths of the runs, one per seed."""
    mean: dict[str, float | None]
    """Measure -> mean over runs; None if a run lacks this measure (most need the model)."""
    sd: dict[str, float | None]
    """Measure -> standard deviation over runs (n - 1); None for a single run."""


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` returns: one row per group of runs."""

    rows: tuple[Compared, ...]
    warnings: tuple[str, ...]
    """Differences that make these runs hard to compare."""

    def figure(self) -> go.Figure:
        """FVU, CE loss score, KL and dead latents against the measured L0, one line per architecture."""
        import plotly.graph_objects as go
        from plotly.colors import qualitative
        from plotly.subplots import make_subplots

        shown = [name for name in PLOTTED if any(row.mean[name] is not None for row in self.rows)]
        figure = make_subplots(
            rows=-(-len(shown) // 2), cols=min(2, len(shown)), subplot_titles=[PLOTTED[n] for n in shown]
        )
        labels = list(dict.fromkeys(row.label for row in self.rows))
        for i, name in enumerate(shown):
            for label, color in zip(labels, itertools.cycle(qualitative.Dark24), strict=False):
                points = [row for row in self.rows if row.label == label and row.mean[name] is not None]
                points.sort(key=lambda row: row.mean["l0"] or 0.0)
                figure.add_trace(
                    go.Scatter(
                        x=[row.mean["l0"] for row in points],
                        y=[row.mean[name] for row in points],
                        error_y={"array": [row.sd[name] or 0.0 for row in points], "thickness": 1},
                        text=[f"{label}, k {row.k}, {len(row.runs)} run(s)" for row in points],
                        name=label,
                        legendgroup=label,
                        showlegend=i == 0,
                        mode="lines+markers",
                        line={"color": color},
                    ),
                    row=i // 2 + 1,
                    col=i % 2 + 1,
                )
        figure.update_xaxes(title_text="L0 at inference", type="log")
        figure.update_layout(template="plotly_white", width=SIZE[0], height=SIZE[1])
        return figure


@accepts_settings(CompareConfig)
def compare(config: CompareConfig) -> Comparison:
    """Compare the evaluations of runs; with ``out``, write compare.json, compare.html and compare.png.

    Each inference mode in which a run was evaluated is a row of its own. Runs whose settings differ only in
    the seed become one row with mean and standard deviation. A run that is named twice counts once. Runs with
    equal settings and equal seeds also count once, because they would not measure the variance over seeds.

    >>> report = sb.evaluate(run, quiet=True)
    >>> [row.sae for row in sb.compare(runs=[run]).rows]
    ['topk']

    Raises:
        UserError: a run was not evaluated, or its evaluation is damaged.
    """
    runs = {run.resolve(): run for run in reversed(config.runs)}.values()
    reports = [report for run in reversed(runs) for report in _reports(run)]
    groups: dict[str, dict[str, tuple[Path, dict[str, Any]]]] = {}
    settings: dict[str, dict[str, Any]] = {}
    repeated: dict[Path, Path] = {}
    for run, report in reports:
        own, seeds = _settings(run)
        kind = json.dumps([own, *(report.get(name) for name in _MEASURED_ON)], sort_keys=True)
        first, _ = groups.setdefault(kind, {}).setdefault(json.dumps(seeds), (run, report))
        if first != run:
            repeated[run] = first
        settings[kind] = own
    varying = _varying_settings(list(settings.values()))
    rows = [
        _row(list(group.values()), varying[settings[kind]["sae"]], settings[kind])
        for kind, group in groups.items()
    ]
    rows.sort(key=lambda row: (row.label, row.d_sae, row.k))
    warnings = _warnings(report for _, report in reports)
    warnings += [
        f"{run} has the same settings and seed as {first} and is left out" for run, first in repeated.items()
    ]
    comparison = Comparison(tuple(rows), tuple(warnings))
    if config.out is not None:
        _write(comparison, config.out)
    return comparison


def _reports(run: Path) -> list[tuple[Path, dict[str, Any]]]:
    files = sorted(Path(run).glob("eval*.json"))
    if not files:
        raise UserError(f"{run} has no evaluation; run saebench eval {run} --model cache first")
    reports = [(Path(run), read_evaluation(file)) for file in files]
    for file, (_, report) in zip(files, reports, strict=True):
        for name in ("sae", "d_sae", "k", "n_tokens", "l0", "fvu"):
            if report.get(name) is None:
                raise UserError(
                    f"{file} is not an evaluation: it has no {name}; run saebench eval {run} again"
                )
    return reports


def _settings(run: Path) -> tuple[dict[str, Any], list[Any]]:
    """(settings, seeds) that determine the trained SAE; runs with equal settings form one group."""
    if not Run(run).is_training_directory:
        return {"sae": Run(run).description()["sae"], "run": str(run)}, []
    facts = Run(run).facts()
    training = {name: value for name, value in facts["train"].items() if name not in _NOT_OF_THE_KIND}
    settings = {**training, **facts["sae"], "sae": facts["sae"]["name"], "cache_hash": facts["cache_hash"]}
    return settings, [facts["train"].get(name) for name in ("seed", "order_seed")]


def _varying_settings(kinds: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Architecture -> the settings other than d_sae and k in which its runs differ."""
    varying = {}
    for sae in {kind["sae"] for kind in kinds}:
        own = [kind for kind in kinds if kind["sae"] == sae]
        names = {name: None for kind in own for name in kind if name not in ("d_sae", "k", "cache_hash")}
        varying[sae] = [name for name in names if len({json.dumps(kind.get(name)) for kind in own}) > 1]
    return varying


def _row(
    group: Sequence[tuple[Path, dict[str, Any]]], varying: Sequence[str], settings: dict[str, Any]
) -> Compared:
    first = group[0][1]
    means: dict[str, float | None] = {}
    deviations: dict[str, float | None] = {}
    for name in MEASURES:
        values = [report.get(name) for _, report in group]
        known = [float(value) for value in values if value is not None]
        complete = len(known) == len(group)
        means[name] = statistics.fmean(known) if complete else None
        deviations[name] = statistics.stdev(known) if complete and len(known) > 1 else None
    inference = first.get("inference")
    return Compared(
        label=", ".join(
            [
                first["sae"],
                *(f"{name} {settings.get(name)}" for name in varying),
                *filter(None, [inference_label(inference)]),
            ]
        ),
        sae=first["sae"],
        inference=inference,
        d_sae=first["d_sae"],
        k=first["k"],
        n_tokens=first["n_tokens"],
        runs=tuple(str(run) for run, _ in group),
        mean=means,
        sd=deviations,
    )


def _warnings(reports: Iterable[dict[str, Any]]) -> list[str]:
    listed = list(reports)
    texts = {
        "cache_hash": "not all runs were measured on rows of the same cache",
        "n_tokens": "not all runs were measured on the same number of rows, which changes the dead share",
        "n_tokens_model": "not all runs were measured with the model on the same number of tokens",
        "d_sae": "not all SAEs have the same number of latents",
        "rows": "some runs were measured on rows that they may have been trained on",
    }
    return [text for name, text in texts.items() if len({report.get(name) for report in listed}) > 1]


def _write(comparison: Comparison, out: Path) -> None:
    require_writable(out, what="the comparison")
    remove_dead(out)
    write_json_atomic(out / "compare.json", dataclasses.asdict(comparison))
    figure = comparison.figure()
    with atomic_file(out / "compare.html", "w") as file:
        file.write(figure.to_html(include_plotlyjs=True, full_html=True))
    write_bytes_atomic(out / "compare.png", _png(figure))


def _png(figure: go.Figure) -> bytes:
    try:
        picture: bytes = figure.to_image("png", width=SIZE[0], height=SIZE[1], scale=2)
    except (ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"compare.html is written, but a PNG needs kaleido and a Chrome or Chromium browser ({reason}); "
            "run pip install 'saebench[png]' and install a browser"
        ) from None
    return picture
