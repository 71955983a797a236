"""Destinations of metrics: metrics.jsonl and metrics.csv always, TensorBoard and Weights & Biases on
request."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from saebench.core.csv_text import csv_line
from saebench.core.errors import UserError
from saebench.core.files import atomic_file, finite, sentence_for_os_errors, sha256_json, sync_directory
from saebench.core.reading import read_bytes
from saebench.runs.layout import METRICS_CSV_FILE, METRICS_FILE
from saebench.runs.metrics_log import metrics_of
from saebench.training.settings import TrainConfig

Metrics = dict[str, float]


class Sink(Protocol):
    def write(self, metrics: Metrics) -> None:
        """Write the metrics of one step; ``metrics["step"]`` is its number."""

    def sync(self) -> None:
        """Bring what was written to the disk: a checkpoint follows, which relies on it."""

    def close(self) -> None:
        """Finish writing; nothing is written afterwards."""


def open_sinks(
    directory: Path, config: TrainConfig, facts: dict[str, Any], *, step: int, stack: contextlib.ExitStack
) -> list[Sink]:
    """All sinks of a run that continues after ``step`` (0 at the start), closed with ``stack``.

    ``facts`` are those of ``run.json``: the same in every call of the run. Lines of later steps, left by a
    killed process, are removed first. Lines up to ``step`` that are missing give a warning.
    """
    logged = {
        done for done in range(1, step + 1) if done % config.log_every == 0 or done == facts.get("n_steps")
    }
    sinks: list[Sink] = [
        Jsonl(directory / METRICS_FILE, step, logged),
        Csv(directory / METRICS_CSV_FILE, step, logged),
    ]
    if config.tensorboard:
        sinks.append(TensorBoard(directory, step))
    if config.wandb is not None:
        sinks.append(WandB(config.wandb, directory, facts))
    for sink in sinks:
        stack.callback(sink.close)
    return sinks


class _LinesFile:
    """A text file of one line per logged step, which continues after ``step``; ``logged`` are the steps up to
    it that were logged."""

    def __init__(self, path: Path, step: int, logged: set[int]) -> None:
        missing = logged - _keep_lines(path, self._step_of, step)
        if missing:
            print(
                f"warning: {path} has no line for {len(missing)} of the {len(logged)} logged steps up to the "
                f"checkpoint at step {step:,} (the first is step {min(missing):,}, the last "
                f"{max(missing):,}); the training goes on, and its curves have a gap there",
                file=sys.stderr,
            )
        self._path = path
        self._file = open(path, "a", encoding="utf-8", newline="")  # noqa: SIM115 - closed by close()
        sync_directory(path.parent)

    def _write(self, text: str) -> None:
        with sentence_for_os_errors(self._path):
            self._file.write(text)
            self._file.flush()

    def sync(self) -> None:
        with sentence_for_os_errors(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def _step_of(line: str) -> int:
        raise NotImplementedError


class Jsonl(_LinesFile):
    """One JSON object per line; null for a number that is not finite."""

    def write(self, metrics: Metrics) -> None:
        self._write(json.dumps(finite(metrics)) + "\n")

    @staticmethod
    def _step_of(line: str) -> int:
        if (metrics := metrics_of(line)) is None:
            raise ValueError("a damaged line")
        return int(metrics["step"])


class Csv(_LinesFile):
    """The same numbers as comma-separated values; the first line names the columns."""

    def write(self, metrics: Metrics) -> None:
        is_first = os.fstat(self._file.fileno()).st_size == 0
        self._write(csv_line(metrics) * is_first + csv_line(metrics.values()))

    @staticmethod
    def _step_of(line: str) -> int:
        return 0 if line.startswith("step,") else int(line.split(",", 1)[0])


class TensorBoard:
    """TensorBoard event files in RUN/tensorboard."""

    def __init__(self, directory: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "--tensorboard needs the package; run pip install 'saebench[tensorboard]'"
            ) from None
        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def write(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(metrics["step"]))

    def sync(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run. Its id depends on the run and its directory only, so a resumed run continues
    it."""

    def __init__(self, project: str, directory: Path, facts: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb needs the package; run pip install 'saebench[wandb]'") from None
        try:
            self._run = wandb.init(
                project=project,
                dir=str(directory),
                name=directory.name,
                id=sha256_json([facts, str(directory)])[:16],
                resume="allow",
                reinit="create_new",  # a sweep has several runs at once
                config=facts,
            )
        except wandb.Error as error:
            reason = str(error).rstrip(". ")
            raise UserError(
                f"--wandb {project}: {reason}; log in, set WANDB_MODE=offline, or leave --wandb out"
            ) from None

    def write(self, metrics: Metrics) -> None:
        self._run.log(metrics, step=int(metrics["step"]))

    def sync(self) -> None:
        """Weights & Biases keeps its own files."""

    def close(self) -> None:
        self._run.finish()


def _keep_lines(path: Path, step_of: Callable[[str], int], step: int) -> set[int]:
    """Remove the lines of ``path`` that are incomplete, damaged or of later steps than ``step``; returns the
    steps of the others."""
    if not path.exists():
        return set()
    content = read_bytes(path, what="the metrics", way_out="move it away")
    lines = content.decode("utf-8", errors="replace").splitlines(keepends=True)
    kept, steps = [], set()
    for line in lines:
        try:
            found = step_of(line)
        except (ValueError, KeyError, TypeError):  # a power failure may leave zeros, or the end of a line
            continue
        if line.endswith("\n") and found <= step:
            kept.append(line)
            steps.add(found)
    if kept != lines:
        with atomic_file(path, "w") as file:
            file.writelines(kept)
    return steps
