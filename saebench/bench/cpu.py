"""The CPU benchmark: training steps of saebench and SAELens, and the gain of a sweep."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import saebench
from saebench.bench import peer
from saebench.bench.provenance import commit, now
from saebench.bench.settings import BenchConfig
from saebench.bench.steps import LEARNING_RATE, encoder_product, error_of, step_of
from saebench.bench.sweeping import SWEEP_PARTS, SweepGain, sweep_gains
from saebench.bench.timing import Timed, Timing, take_turns
from saebench.core.settings import to_flat
from saebench.saes.base import SAE, Batch

PRODUCT = "encoder product"
OURS = ("topk", "mutual-choice", "matching-pursuit")
THEIRS: dict[str, dict[str, Any]] = {
    "topk": {"architecture": "topk"},
    "mutual-choice": {"architecture": "batchtopk"},
    "matching-pursuit": {
        "architecture": "matching_pursuit",
        "residual_threshold": 0.0,
        "stop_on_duplicate_support": False,
        "decoder_init_norm": 1.0,
    },
}
"""SAELens's settings for each architecture of ours; its matching pursuit makes k picks for every row."""
GOALS = (
    ("sae-lens topk", "saebench topk", "at least", 3.5),
    ("sae-lens matching_pursuit", "saebench matching-pursuit", "at least", 4.0),
    ("saebench mutual-choice", "saebench topk", "at most", 1.3),
)
N_BATCHES = 16
"""Batches of random rows; at the default sizes they take 64 MiB, more than the processor's caches."""
ERROR_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; ``timing`` is None if the library is not installed."""

    name: str
    timing: Timing | None
    error: float | None = None
    """Relative error of the reconstruction against float64; None for SAELens and the product."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Ratio of the median times of ``slower`` and ``faster``; ``value`` is None if one is missing."""

    slower: str
    faster: str
    value: float | None
    bound: str
    goal: float

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.goal if self.bound == "at least" else self.value <= self.goal


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """The measurements with their date, device, versions and settings."""

    device: str
    versions: dict[str, str]
    settings: dict[str, Any]
    optimizer: str
    rows: list[Row]
    ratios: list[Ratio]
    sweep: list[SweepGain]
    date: str = field(default_factory=now)
    commit: str | None = field(default_factory=commit)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        data = dataclasses.asdict(self)
        for shown, ratio in zip(data["ratios"], self.ratios, strict=True):
            shown["met"] = ratio.met
        for shown, gain in zip(data["sweep"], self.sweep, strict=True):
            shown["gain"] = gain.gain
        return data


def measure(config: BenchConfig, announce: Callable[[str], None]) -> BenchReport:
    """Time training steps on the CPU.

    A step is everything that the training loop does with a batch in memory: forward, loss, backward,
    clipping, Adam, decoder norm and counters. For SAELens it is ``step`` of its trainer. Rows are random
    normal numbers. No latent is dead, so neither library computes an auxiliary loss.

    Raises:
        UserError: the peers' environment is broken.
    """
    with _threads(config.threads), tempfile.TemporaryDirectory() as folder:
        rows, versions = _steps(config, Path(folder), announce)
        gains = sweep_gains(config, Path(folder), announce=announce)
    median = {row.name: row.timing.median for row in rows if row.timing is not None}
    ratios = [
        Ratio(
            slower=slower,
            faster=faster,
            value=median[slower] / median[faster] if slower in median and faster in median else None,
            bound=bound,
            goal=goal,
        )
        for slower, faster, bound, goal in GOALS
    ]
    return BenchReport(
        device=f"{processor()}, {config.threads} threads",
        versions=versions,
        settings=to_flat(config),
        optimizer=f"Adam, lr {LEARNING_RATE:g}, gradient clipped to norm 1, fp32",
        rows=rows,
        ratios=ratios,
        sweep=gains,
    )


def n_parts(config: BenchConfig) -> int:
    """How often `measure` calls ``announce``."""
    n_entries = 1 + len(OURS) + (len(THEIRS) if peer.python_of(config.peers) else 0)
    return (config.turns + 1) * n_entries + SWEEP_PARTS


def _steps(
    config: BenchConfig, folder: Path, announce: Callable[[str], None]
) -> tuple[list[Row], dict[str, str]]:
    generator = torch.Generator().manual_seed(0)
    rows_ND = torch.randn(N_BATCHES * config.batch_size, config.d_in, generator=generator)
    sizes = {"batch_size": config.batch_size, "d_sae": config.d_sae}
    entries: dict[str, Timed] = {PRODUCT: encoder_product(rows_ND, **sizes)}
    ours: dict[str, SAE] = {}
    for name in OURS:
        ours[f"saebench {name}"], entries[f"saebench {name}"] = step_of(name, rows_ND, **sizes, k=config.k)
    versions = {"saebench": saebench.__version__, "torch": torch.__version__}
    with contextlib.ExitStack() as stack:
        if peer.python_of(config.peers) is None:
            versions["sae-lens"] = peer.MISSING
        else:
            running = stack.enter_context(peer.running_peer(config.peers, threads=config.threads))
            installed = running.ask("versions", threads=config.threads)
            versions |= {"sae-lens": installed["sae-lens"], "sae-lens's torch": installed["torch"]}
            entries |= _peer_steps(running, rows_ND, config, folder)
        timings = take_turns(entries, turns=config.turns, announce=announce)
    batch = Batch(rows_ND[:ERROR_ROWS])
    rows = [
        Row(name=name, timing=timing, error=error_of(ours[name], batch) if name in ours else None)
        for name, timing in timings.items()
    ]
    rows += [Row(name=name, timing=None) for name in _peer_names() if name not in timings]
    return rows, versions


def _peer_steps(running: peer.Peer, rows_ND: Tensor, config: BenchConfig, folder: Path) -> dict[str, Timed]:
    import numpy as np

    np.save(folder / "rows.npy", rows_ND.numpy())
    size = {"d_in": config.d_in, "d_sae": config.d_sae}
    saes = {}
    for name, theirs in zip(_peer_names(), THEIRS.values(), strict=True):
        budget = "max_iterations" if theirs["architecture"] == "matching_pursuit" else "k"
        saes[name] = {**theirs, **size, budget: config.k}
    running.ask("begin", data=str(folder / "rows.npy"), batch_size=config.batch_size, saes=saes)
    done = dict.fromkeys(saes, 0)

    def step_of_peer(name: str) -> Timed:
        def step() -> float:
            done[name] += 1
            return float(running.ask("step", name=name, batch=done[name])["seconds"])

        return step

    return {name: step_of_peer(name) for name in saes}


def _peer_names() -> list[str]:
    return [f"sae-lens {theirs['architecture']}" for theirs in THEIRS.values()]


@contextlib.contextmanager
def _threads(n_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def processor() -> str:
    """The processor's name as the operating system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
