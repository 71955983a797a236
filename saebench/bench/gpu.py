"""The GPU benchmark: encoders and training steps, compared with a matrix product and other libraries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import saebench
from saebench.bench import gpu_peers
from saebench.bench.gpu_ours import ENCODERS, PURSUIT, STEPS, TOPK, product
from saebench.bench.gpu_sizes import SIZES, Make, Size
from saebench.bench.gpu_timing import CALL_SECONDS, MOST_REPEATS, free, peak_gib, reason, timed
from saebench.bench.provenance import commit, now
from saebench.bench.settings import BenchConfig
from saebench.bench.steps import LEARNING_RATE
from saebench.bench.timing import Timed, Timing, take_turns
from saebench.core.errors import UserError

N_BATCHES = 4
"""Batches of random rows; together with the weights they exceed the GPU's caches."""
STEPS_TO_PEAK = 10
"""Number of steps after which our CUDA graphs are captured and all memory is allocated."""
PRODUCT = "bare product"
NOT_FUSED = "left out: matching pursuit is not fused for more than 65,536 latents"
GOALS: tuple[tuple[str, str, dict[str, float]], ...] = (
    ("topk encode", PRODUCT, {"S1": 1.25, "S2": 1.10}),
    ("gradient encode", "two bare products", {"S1": 1.35, "S2": 1.15}),
    ("mutual-choice encode", PRODUCT, {"S1": 1.35, "S2": 1.15}),
    ("mutual-choice step", TOPK, {"S1": 1.15, "S2": 1.15}),
    ("transcoder step", TOPK, {"S1": 1.1, "S2": 1.1}),
)
"""(slower, faster, largest ratio of their times by size)."""
LEAST_TIMES: dict[str, float] = {"S1": 3.6, "S2": 2.5}
"""Smallest ratio of the time of other libraries to that of our TopK step, by size."""
MOST_MS: dict[str, dict[str, float]] = {
    TOPK: {"S1": 1.35, "S2": 9.3},
    "topk step, 5% dead": {"S1": 1.8, "S2": 12.0},
    PURSUIT: {"S1": 16.0, "S2": 120.0},
}
"""Goals in milliseconds, on an H100."""


@dataclass(frozen=True, kw_only=True)
class GpuRow:
    """One entry at one size; if it could not be measured, only ``reason`` is set."""

    size: str
    name: str
    timing: Timing | None = None
    products: float | None = None
    """Median time divided by that of the bare product."""
    goal_ms: float | None = None
    memory_gib: float | None = None
    """Peak memory of a step in addition to weights, optimizer and data; None for an encoder."""
    reason: str | None = None

    @property
    def met(self) -> bool | None:
        if self.goal_ms is None or self.timing is None:
            return None
        return 1e3 * self.timing.median <= self.goal_ms


@dataclass(frozen=True, kw_only=True)
class GpuRatio:
    """Ratio of the interleaved median times of ``slower`` and ``faster``; ``goal`` is None without a goal."""

    size: str
    slower: str
    faster: str
    value: float
    goal: float | None
    bound: str = "at most"

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value <= self.goal if self.bound == "at most" else self.value >= self.goal


@dataclass(frozen=True, kw_only=True)
class GpuReport:
    """The measurements with their date, device, versions and settings."""

    device: str
    versions: dict[str, str]
    settings: dict[str, Any]
    sizes: tuple[Size, ...]
    rows: list[GpuRow]
    ratios: list[GpuRatio]
    date: str = field(default_factory=now)
    commit: str | None = field(default_factory=commit)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        data = dataclasses.asdict(self)
        for shown, row in zip(data["rows"], self.rows, strict=True):
            shown["met"] = row.met
        for shown, ratio in zip(data["ratios"], self.ratios, strict=True):
            shown["met"] = ratio.met
        return data


def require_gpu() -> None:
    """Raise a UserError if there is no GPU."""
    if not torch.cuda.is_available():
        raise UserError("no GPU was found; run saebench bench --cpu")


def n_parts(config: BenchConfig) -> int:
    """How often `measure` calls ``announce`` if nothing fails."""
    ours = sum(1 + len(group) for size in SIZES for group in _ours(size))
    return (config.turns + 1) * (ours + sum(2 * len(_others(size)) for size in SIZES))


def measure(config: BenchConfig, announce: Callable[[str], None]) -> GpuReport:
    """Time all entries at all sizes.

    Products are in bfloat16, master weights in float32, gradients are clipped to norm 1, and rows are random
    normal numbers. A step of ours is everything that a training does with rows on the GPU, including CUDA
    graphs. All entries together do not fit in memory. So at each size, our entries other than matching
    pursuit are interleaved with each other and with the bare product, and matching pursuit with the bare
    product. Then each entry of `saebench.bench.gpu_peers` is built, interleaved with its counterpart of ours,
    and freed. An entry that fails, for example for lack of memory, gets a row with the reason.
    """
    rows: list[GpuRow] = []
    ratios: list[GpuRatio] = []
    for size in SIZES:
        of_size = _Measuring(size, _random_rows(size), config.turns, announce)
        for group in _ours(size):
            of_size.measure_ours(group)
        for name, make in _others(size).items():
            of_size.measure_peer(name, make)
        if size.only_topk:
            of_size.leave_out_pursuit()
        rows += of_size.rows
        ratios += of_size.ratios
        del of_size
        free()
    import triton

    return GpuReport(
        device=torch.cuda.get_device_name(),
        versions={
            "saebench": saebench.__version__,
            "torch": torch.__version__,
            "triton": triton.__version__,
            **gpu_peers.versions(),
        },
        settings={
            "turns": config.turns,
            "most_repeats": MOST_REPEATS,
            "call_seconds": CALL_SECONDS,
            "lr": LEARNING_RATE,
            "dtype": "bf16",
        },
        sizes=SIZES,
        rows=rows,
        ratios=ratios,
    )


class _Measuring:
    """Measures the entries of one size and collects their rows and ratios."""

    def __init__(self, size: Size, rows_BND: Tensor, turns: int, announce: Callable[[str], None]) -> None:
        self.size, self.rows_BND, self.turns, self.announce = size, rows_BND, turns, announce
        self.rows: list[GpuRow] = []
        self.ratios: list[GpuRatio] = []
        self._kept: dict[str, Timed] = {}
        self._product = 0.0

    def measure_ours(self, group: dict[str, Make]) -> None:
        """Time entries of ours interleaved with the bare product; keep those that peers are compared with."""
        free()
        entries = {PRODUCT: timed(product(self.size, self.rows_BND))}
        memory: dict[str, float] = {}
        failed: dict[str, str] = {}
        for name, make in group.items():
            try:
                once = make(self.size, self.rows_BND)
                if name in STEPS:
                    memory[name] = peak_gib(once, calls=STEPS_TO_PEAK)
            except Exception as error:  # usually out of memory; the other entries are still measured
                failed[name] = reason(error)
                continue
            entries[name] = timed(once)
        timings = take_turns(entries, turns=self.turns, announce=self.announce)
        medians = {name: timing.median for name, timing in timings.items()}
        if not self._product:
            self._product = medians[PRODUCT]
            self._add(PRODUCT, timings[PRODUCT], None)
        for name in group:
            if name in failed:
                self._left_out(name, failed[name])
            else:
                self._add(name, timings[name], memory.get(name))
        medians["two bare products"] = 2 * medians[PRODUCT]
        self.ratios += [
            GpuRatio(
                size=self.size.name,
                slower=slower,
                faster=faster,
                value=medians[slower] / medians[faster],
                goal=goal[self.size.name],
            )
            for slower, faster, goal in GOALS
            if slower in medians and faster in medians
        ]
        self._kept |= {name: entries[name] for name in _COMPARED if name in entries}

    def measure_peer(self, name: str, make: Make) -> None:
        """Time an entry of another library, interleaved with its counterpart of ours."""
        free()
        ours = _counterpart(name)
        beside = {ours: self._kept[ours]} if ours in self._kept else {}
        try:
            once = make(self.size, self.rows_BND)
            once()  # optimizers allocate their memory in the first step
            memory = peak_gib(once, calls=1)
            timings = take_turns(beside | {name: timed(once)}, turns=self.turns, announce=self.announce)
        except Exception as error:  # another library may raise anything
            self._left_out(name, reason(error))
            return
        self._add(name, timings[name], None if name in gpu_peers.ENCODERS else memory)
        if ours in timings:
            goal = LEAST_TIMES.get(self.size.name) if ours == TOPK else None
            self.ratios.append(
                GpuRatio(
                    size=self.size.name,
                    slower=name,
                    faster=ours,
                    value=timings[name].median / timings[ours].median,
                    goal=goal,
                    bound="at least",
                )
            )

    def _add(self, name: str, timing: Timing, memory_gib: float | None) -> None:
        self.rows.append(
            GpuRow(
                size=self.size.name,
                name=name,
                timing=timing,
                products=timing.median / self._product,
                goal_ms=MOST_MS.get(name, {}).get(self.size.name),
                memory_gib=memory_gib,
            )
        )

    def leave_out_pursuit(self) -> None:
        for name in (PURSUIT, gpu_peers.PURSUIT):
            self._left_out(name, NOT_FUSED)

    def _left_out(self, name: str, why: str) -> None:
        self.rows.append(GpuRow(size=self.size.name, name=name, reason=why))


def _random_rows(size: Size) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (N_BATCHES, size.batch_size, size.d_in)
    return torch.randn(shape, generator=generator, device="cuda").bfloat16()


def _ours(size: Size) -> list[dict[str, Make]]:
    if size.only_topk:
        return [{TOPK: STEPS[TOPK]}]
    steps = {name: make for name, make in STEPS.items() if name != PURSUIT}
    return [ENCODERS | steps, {PURSUIT: STEPS[PURSUIT]}]


def _others(size: Size) -> dict[str, Make]:
    steps = gpu_peers.STEPS
    if size.only_topk:
        return {name: make for name, make in steps.items() if name != gpu_peers.PURSUIT}
    return gpu_peers.ENCODERS | steps


def _counterpart(name: str) -> str:
    if name in gpu_peers.ENCODERS:
        return "topk encode"
    return PURSUIT if name == gpu_peers.PURSUIT else TOPK


_COMPARED = ("topk encode", TOPK, PURSUIT)
