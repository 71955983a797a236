"""File names of a run directory, and reading of ``run.json``, which describes the training.

run.json                            settings, architecture, model, hook and cache; written first
checkpoints/step-NNNNNNNNN.safetensors   the complete training state at a step
metrics.jsonl, metrics.csv          the metrics of each logged step
sessions.jsonl                      the processes that ran the training, with their speed
sae.safetensors, sae.json           the trained SAE; sae.json is written last
eval.json, eval-proxy.json, ...     evaluations, one per inference mode
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saebench.core.errors import UserError
from saebench.core.files import read_json

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
METRICS_CSV_FILE = "metrics.csv"
SESSIONS_FILE = "sessions.jsonl"
CHECKPOINT_FOLDER = "checkpoints"
FORMAT_VERSION = 2
"""Of transcoders and crosscoders; the run of an SAE of one site is written as version 1."""
_KINDS: dict[str, type] = {"train": dict, "sae": dict, "cache_hash": str}
"""Required values of ``run.json`` and their types."""


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
    if not isinstance(version, int):
        raise UserError(f"{file} is not a run description of saebench; choose another --out")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{file} has format {version}; this saebench reads up to {FORMAT_VERSION}: update saebench"
        )
    for name in needs:
        if not isinstance(facts.get(name), _KINDS[name]):
            raise _damaged(file, name, facts.get(name))
    for part, name in (("train", "cache"), ("sae", "name")):
        if part in needs and not isinstance(facts[part].get(name, ""), str):
            raise _damaged(file, f"{part}.{name}", facts[part][name])
    if "sae" in needs and "name" not in facts["sae"]:
        raise _damaged(file, "sae.name", None)
    return dict(facts)


def _damaged(file: Path, name: str, value: object) -> UserError:
    return UserError(f"{file} is damaged: {name} is {value!r:.60}; restore a copy or train the run again")
