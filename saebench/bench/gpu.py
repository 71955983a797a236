"""Encoders and whole training steps on one GPU, against the bare matrix product and plain torch, in turns.

Shapes: N rows, D = d_in, M = d_sae latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import saebench
from saebench.activations.loader import Rows
from saebench.bench.timing import Timed, Timing, take_turns
from saebench.config import BenchConfig, TrainConfig, architecture
from saebench.errors import UserError
from saebench.saes.base import Batch
from saebench.training.trainee import STEPS_BETWEEN_LOOKS, Trainee, fresh_state
from saebench_kernels import gradient_topk_encode, mutual_choice_encode, topk_encode

LEARNING_RATE = 3e-4
N_BATCHES = 4
"""Batches of random rows; with the weights they are more than a cache holds."""
REPEATS = 10
"""Calls timed together: launching one takes longer than its first kernels."""
DEAD_SHARE = 20
"""One latent in so many is dead where AuxK is at work."""
PRODUCT, PLAIN = "bare product", "plain torch step"


@dataclass(frozen=True, kw_only=True)
class Size:
    """A problem of the benchmark."""

    name: str
    batch_size: int
    d_in: int
    d_sae: int
    k: int


SIZES = (
    Size(name="S1", batch_size=8192, d_in=768, d_sae=24_576, k=32),
    Size(name="S2", batch_size=8192, d_in=2304, d_sae=65_536, k=64),
)
"""GPT-2 small, 32 latents a dimension, and Gemma 2 2B, 28."""
GOALS: tuple[tuple[str, str, dict[str, float]], ...] = (
    ("topk encode", PRODUCT, {"S1": 1.25, "S2": 1.10}),
    ("gradient encode", "two bare products", {"S1": 1.35, "S2": 1.15}),
    ("mutual-choice encode", PRODUCT, {"S1": 1.35, "S2": 1.15}),
    ("mutual-choice step", "topk step", {"S1": 1.15, "S2": 1.15}),
)
"""At most so many times as long."""
MOST_MS: dict[str, dict[str, float]] = {
    "topk step": {"S1": 1.35, "S2": 9.3},
    "topk step, 5% dead": {"S1": 1.8, "S2": 12.0},
}
"""Goals in milliseconds, on an H100."""


@dataclass(frozen=True, kw_only=True)
class GpuRow:
    """One contestant at one size."""

    size: str
    name: str
    timing: Timing
    products: float
    """How many bare products fit into its median."""
    goal_ms: float | None
    memory_gib: float | None
    """Peak of a step beyond weights, optimizer and data; None for an encoder."""


@dataclass(frozen=True, kw_only=True)
class GpuRatio:
    """How many times as long ``slower`` takes as ``faster``."""

    size: str
    slower: str
    faster: str
    value: float
    goal: float


@dataclass(frozen=True, kw_only=True)
class GpuReport:
    """What was measured, where, and with what."""

    device: str
    versions: dict[str, str]
    settings: dict[str, Any]
    sizes: tuple[Size, ...]
    rows: list[GpuRow]
    ratios: list[GpuRatio]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def require_gpu() -> None:
    """Refuse to go on without one."""
    if not torch.cuda.is_available():
        raise UserError("there is no GPU to measure on; say saebench bench --cpu")


def n_parts(config: BenchConfig) -> int:
    """How often `measure` says what it is at."""
    return len(SIZES) * (config.turns + 1) * (len(_ENCODERS) + len(_STEPS) + 2)


def measure(config: BenchConfig, said: Callable[[str], None]) -> GpuReport:
    """Time everything in turns: bfloat16 products, float32 masters, gradients clipped to norm 1.

    A step is all that a training does with rows that are on the GPU, as it does it: as a graph where it is
    one. 'plain torch' is the same TopK step with a dense code, autocast and torch's fused Adam. Rows are
    random normal numbers.
    """
    device = torch.device("cuda")
    rows: list[GpuRow] = []
    ratios: list[GpuRatio] = []
    for size in SIZES:
        contestants, memory = _contestants(size, device)
        timings = take_turns(contestants, turns=config.turns, said=said)
        medians = {name: timing.median for name, timing in timings.items()}
        medians["two bare products"] = 2 * medians[PRODUCT]
        rows += [
            GpuRow(
                size=size.name,
                name=name,
                timing=timing,
                products=timing.median / medians[PRODUCT],
                goal_ms=MOST_MS.get(name, {}).get(size.name),
                memory_gib=memory.get(name),
            )
            for name, timing in timings.items()
        ]
        ratios += [
            GpuRatio(
                size=size.name,
                slower=slower,
                faster=faster,
                value=medians[slower] / medians[faster],
                goal=goal[size.name],
            )
            for slower, faster, goal in GOALS
        ]
        del contestants
        torch.cuda.empty_cache()
    import triton

    return GpuReport(
        device=torch.cuda.get_device_name(device),
        versions={"saebench": saebench.__version__, "torch": torch.__version__, "triton": triton.__version__},
        settings={"turns": config.turns, "repeats": REPEATS, "lr": LEARNING_RATE, "dtype": "bf16"},
        sizes=SIZES,
        rows=rows,
        ratios=ratios,
    )


def _contestants(size: Size, device: torch.device) -> tuple[dict[str, Timed], dict[str, float]]:
    generator = torch.Generator(device).manual_seed(0)
    shape = (N_BATCHES, size.batch_size, size.d_in)
    rows_BND = torch.randn(shape, generator=generator, device=device).bfloat16()
    contestants: dict[str, Timed] = {PRODUCT: _timed(_product(size, rows_BND))}
    memory: dict[str, float] = {}
    for name, encode in _ENCODERS.items():
        contestants[name] = _timed(_as_graph(encode(size, rows_BND[0])))
    for name, make in _STEPS.items():
        contestants[name] = _timed(make(size, rows_BND))
        memory[name] = _peak_gib(contestants[name])
    contestants[PLAIN] = _timed(_plain_step(size, rows_BND))
    memory[PLAIN] = _peak_gib(contestants[PLAIN])
    return contestants, memory


def _timed(once: Callable[[], object]) -> Timed:
    """Seconds of one call, from events around ``REPEATS`` of them."""

    def timed() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(REPEATS):
            once()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / REPEATS

    return timed


def _peak_gib(timed: Timed) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    timed()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def _as_graph(once: Callable[[], object]) -> Callable[[], object]:
    for _ in range(3):
        once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()

    def replay(kept: Callable[[], object] = once) -> None:  # with it, the tensors that the graph reads
        graph.replay()

    return replay


def _product(size: Size, rows_BND: Tensor) -> Callable[[], object]:
    W_MD = torch.randn(size.d_sae, size.d_in, device=rows_BND.device).bfloat16()
    out_NM = torch.empty(size.batch_size, size.d_sae, dtype=torch.bfloat16, device=rows_BND.device)
    return lambda: torch.mm(rows_BND[0], W_MD.T, out=out_NM)


def _weights(size: Size, device: torch.device) -> tuple[torch.nn.Parameter, Tensor]:
    W_MD = torch.randn(size.d_sae, size.d_in, device=device) / size.d_in**0.5
    return torch.nn.Parameter(W_MD), torch.zeros(size.d_sae, device=device)


def _topk(size: Size, x_ND: Tensor) -> Callable[[], object]:
    W_MD, b_M = _weights(size, x_ND.device)
    return lambda: topk_encode(x_ND, W_MD, b_M, size.k, scan_dtype=torch.bfloat16)


def _gradient(size: Size, x_ND: Tensor) -> Callable[[], object]:
    (W_MD, b_M), (D_MD, _) = _weights(size, x_ND.device), _weights(size, x_ND.device)
    g_ND = torch.randn_like(x_ND)
    return lambda: gradient_topk_encode(x_ND, g_ND, W_MD, D_MD, b_M, size.k, 1.0, scan_dtype=torch.bfloat16)


def _mutual_choice(size: Size, x_ND: Tensor) -> Callable[[], object]:
    W_MD, b_M = _weights(size, x_ND.device)
    budget = size.k * size.batch_size
    values_S, _, _ = mutual_choice_encode(
        x_ND, W_MD, b_M, budget, torch.zeros((), device=x_ND.device), scan_dtype=torch.bfloat16
    )
    hint = 0.95 * values_S.min()
    return lambda: mutual_choice_encode(x_ND, W_MD, b_M, budget, hint, scan_dtype=torch.bfloat16)


_ENCODERS: dict[str, Callable[[Size, Tensor], Callable[[], object]]] = {
    "topk encode": _topk,
    "gradient encode": _gradient,
    "mutual-choice encode": _mutual_choice,
}


def _step(name: str, *, dead: bool = False) -> Callable[[Size, Tensor], Callable[[], object]]:
    """The step of a training of architecture ``name``; with ``dead``, one latent in 20 never fires."""

    def make(size: Size, rows_BND: Tensor) -> Callable[[], object]:
        sae_class, device = architecture(name), rows_BND.device
        spec = sae_class.Spec(d_sae=size.d_sae, k=size.k)
        config = TrainConfig(
            cache=Path("cache"), out=Path("out"), sae=name, batch_size=size.batch_size,
            tokens=size.batch_size * 1_000_000, normalize=False, dtype="bf16",
        )  # fmt: skip
        gradients_BND = torch.randn_like(rows_BND) if sae_class.uses_gradients else None
        sample = Batch(rows_BND[0].float(), None if gradients_BND is None else gradients_BND[0].float())
        member = Trainee(
            config=config,
            spec=spec,
            facts={},
            state=fresh_state(config, spec, sample, device),
            n_steps=1_000_000,
            sinks=[],
            sound=torch.ones((), dtype=torch.bool, device=device),
            sound_steps=torch.zeros((), dtype=torch.int64, device=device),
            first_step=0,
        )
        if dead:
            sae = member.state.sae
            with torch.no_grad():  # too weak to be among the k largest, but half of them positive
                sae.W_enc_MD[::DEAD_SHARE] *= 1e-3
            sae.tokens_since_fired[::DEAD_SHARE] = sae.dead_after

        def once() -> None:
            step = member.state.step
            if step % STEPS_BETWEEN_LOOKS == 0:
                member.state.sae.look_for_dead()
            at = step % len(rows_BND)
            rows = Rows(rows_BND[at], None if gradients_BND is None else gradients_BND[at])
            member.steps.take(rows, 0.5, LEARNING_RATE)
            member.state.step += 1

        return once

    return make


_STEPS: dict[str, Callable[[Size, Tensor], Callable[[], object]]] = {
    "topk step": _step("topk"),
    "topk step, 5% dead": _step("topk", dead=True),
    "mutual-choice step": _step("mutual-choice"),
    "gradient step": _step("gradient"),
}


def _plain_step(size: Size, rows_BND: Tensor) -> Callable[[], object]:
    device = rows_BND.device
    W_enc_DM, W_dec_MD = (
        torch.nn.Parameter(torch.randn(shape, device=device) / size.d_in**0.5)
        for shape in ((size.d_in, size.d_sae), (size.d_sae, size.d_in))
    )
    b_enc_M, b_dec_D = (torch.nn.Parameter(torch.zeros(n, device=device)) for n in (size.d_sae, size.d_in))
    parameters = [W_enc_DM, W_dec_MD, b_enc_M, b_dec_D]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)
    steps = 0

    def once() -> None:
        nonlocal steps
        x_ND = rows_BND[steps % len(rows_BND)].float()
        with torch.autocast("cuda", torch.bfloat16):
            pre_NM = ((x_ND - b_dec_D) @ W_enc_DM + b_enc_M).relu()
            top = pre_NM.topk(size.k, dim=1, sorted=False)
            code_NM = torch.zeros_like(pre_NM).scatter(1, top.indices, top.values)
            x_hat_ND = code_NM @ W_dec_MD + b_dec_D
        (x_ND - x_hat_ND.float()).square().mean().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            W_dec_MD.div_(W_dec_MD.norm(dim=1, keepdim=True))
        steps += 1

    return once
