"""File names of a run directory, and reading of ``run.json``, which describes the training.

run.json                            settings, architecture, model, hook and cache; written first
checkpoints/step-NNNNNNNNN.safetensors   the complete training state at a step
metrics.jsonl, metrics.csv          the metrics of each logged step
sessions.jsonl                      the processes that ran the training, with their speed
sae.safetensors, sae.json           the trained SAE; sae.json is written last
warnings.json                       what is wrong with the result, if anything is
eval.json, eval-proxy.json, ...     evaluations, one per inference mode
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saebench.core.errors import UserError
from saebench.core.reading import check_shape, read_json
from saebench.core.shapes import ContextFacts, ModelFacts, Name, Number, PathText, Positive, Shape, Text

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
METRICS_CSV_FILE = "metrics.csv"
SESSIONS_FILE = "sessions.jsonl"
WARNINGS_FILE = "warnings.json"
CHECKPOINT_FOLDER = "checkpoints"
_WAY_OUT = "restore a copy or train the run again"
FORMAT_VERSION = 2
"""Of transcoders and crosscoders; the run of an SAE of one site is written as version 1."""


class _Train(Shape):
    cache: PathText | None = None


class _Sae(Shape):
    name: Name


class _Run(Shape):
    """What run.json must have, where it has it at all; `read_run` knows what it needs."""

    train: _Train = _Train()
    sae: _Sae = _Sae(name="-")
    cache_hash: Name = "-"
    d_in: Positive = 1
    n_steps: Positive = 1
    hook_name: Text | None = None
    model: ModelFacts | None = None
    contexts: ContextFacts | None = None


class Evaluation(Shape):
    """The numbers of eval.json that comparisons, exports and stores use; see saebench/evaluation."""

    sae: Text | None = None
    inference: Text | None = None
    d_sae: Positive | None = None
    k: Positive | None = None
    n_tokens: Positive | None = None
    l0: Number | None = None
    fvu: Number | None = None
    explained_variance: Number | None = None
    ce_loss_score: Number | None = None
    ce_delta: Number | None = None
    kl: Number | None = None
    dead_fraction: Number | None = None
    picks_changed: Number | None = None


def eval_file(inference: str | None = None) -> str:
    """Name of the evaluation in one inference mode; None for the default mode."""
    return f"eval-{inference}.json" if inference else "eval.json"


def read_run(directory: Path, *, needs: tuple[str, ...] = ("train", "sae", "cache_hash")) -> dict[str, Any]:
    """The facts in ``run.json``: train, sae, d_in, hook_name, model, cache_hash, contexts, n_steps.

    Raises:
        UserError: the file is missing, its format is newer, or a value in ``needs`` is missing or damaged.
    """
    file = directory / RUN_FILE
    facts = read_json(file, what="the run description")
    version = facts.get("format_version") if isinstance(facts, dict) else None
    if type(version) is not int:
        raise UserError(f"{file} is not a run description of saebench; choose another --out")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{file} has format {version}; this saebench reads up to {FORMAT_VERSION}: update saebench"
        )
    check_shape(facts, _Run, source=str(file), way_out=_WAY_OUT)
    for name in needs:
        if name not in facts:
            raise UserError(f"{file} is damaged: it has no {name}; {_WAY_OUT}")
    return dict(facts)


def read_evaluation(file: Path) -> dict[str, Any]:
    """The contents of an ``eval.json``; values may be missing or None.

    Raises:
        UserError: the file is missing or damaged.
    """
    way_out = f"run saebench eval {file.parent} again"
    report: dict[str, Any] = read_json(file, what="the evaluation", shape=Evaluation, way_out=way_out)
    return report
