"""Destinations of metrics: metrics.jsonl and metrics.csv always, TensorBoard and Weights & Biases on
request."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from pathlib import Path
from typing import Any, Protocol

from saebench.core.errors import UserError
from saebench.core.files import atomic_file, finite, sentence_for_os_errors, sha256_json
from saebench.runs.layout import METRICS_CSV_FILE, METRICS_FILE
from saebench.training.settings import TrainConfig

Metrics = dict[str, float]


class Sink(Protocol):
    def write(self, metrics: Metrics) -> None:
        """Write the metrics of one step; ``metrics["step"]`` is its number."""

    def close(self) -> None:
        """Finish writing; nothing is written afterwards."""


def open_sinks(
    directory: Path, config: TrainConfig, facts: dict[str, Any], *, step: int, stack: contextlib.ExitStack
) -> list[Sink]:
    """All sinks of a run that continues after ``step`` (0 at the start), closed with ``stack``.

    ``facts`` are those of ``run.json``: the same in every call of the run. Lines of later steps, left by a
    killed process, are removed first.
    """
    sinks: list[Sink] = [Jsonl(directory / METRICS_FILE, step), Csv(directory / METRICS_CSV_FILE, step)]
    if config.tensorboard:
        sinks.append(TensorBoard(directory, step))
    if config.wandb is not None:
        sinks.append(WandB(config.wandb, directory, facts))
    for sink in sinks:
        stack.callback(sink.close)
    return sinks


class Jsonl:
    """One JSON object per line; null for a number that is not finite."""

    def __init__(self, path: Path, step: int) -> None:
        _keep_lines(path, lambda line: int(json.loads(line)["step"]) <= step)
        self._path = path
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def write(self, metrics: Metrics) -> None:
        with sentence_for_os_errors(self._path):
            self._file.write(json.dumps(finite(metrics)) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


class Csv:
    """The same numbers as comma-separated values; the first line names the columns."""

    def __init__(self, path: Path, step: int) -> None:
        _keep_lines(path, lambda line: line.startswith("step,") or int(line.split(",", 1)[0]) <= step)
        self._path = path
        self._empty = not path.exists() or path.stat().st_size == 0
        self._file = open(path, "a", encoding="utf-8", newline="")  # noqa: SIM115 - closed by close()

    def write(self, metrics: Metrics) -> None:
        line = io.StringIO()
        writer = csv.DictWriter(line, list(metrics), lineterminator="\n")
        if self._empty:
            writer.writeheader()
            self._empty = False
        writer.writerow(metrics)
        with sentence_for_os_errors(self._path):
            self._file.write(line.getvalue())
            self._file.flush()

    def close(self) -> None:
        self._file.close()


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

    def close(self) -> None:
        self._run.finish()


def _keep_lines(path: Path, wanted: Any) -> None:
    """Remove the lines of ``path`` that are incomplete or not ``wanted``."""
    if not path.exists():
        return
    lines = path.read_text("utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and wanted(line)]
    if kept != lines:
        with atomic_file(path, "w") as file:
            file.writelines(kept)
