"""The quality benchmark: SAEs of saebench and SAELens trained on the same rows of known features.

Shapes: N rows, D = d_in, M = d_sae latents.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saebench.activations.cache import ActivationCache
from saebench.activations.importing import HELD_OUT_SHARE, import_activations
from saebench.bench.cpu import THEIRS
from saebench.bench.peer import Peer
from saebench.evaluation.synthetic import GroundTruth, World
from saebench.evaluation.synthetic.recovery import absolute_cosines, mcc_hungarian
from saebench.formats.saelens.names import WEIGHTS_FILE
from saebench.saes.base import SAE
from saebench.training import sweep

LEARNING_RATES = (3e-3, 1e-2, 3e-2)
"""Each library uses the best of these; SAELens's default, 3e-4, is meant for runs of many more steps."""
WARMUP, DECAY = 0.05, 0.3
"""Shares of the steps; these are the defaults of saebench, and SAELens uses the same schedule."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """The data and settings that both libraries train with."""

    world: World
    d_sae: int
    k: int
    tokens: int
    """Rows to train on, each used once."""
    batch_size: int
    test_rows: int
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The quality of one architecture of one library; lists have one number per seed."""

    name: str
    lr: float
    explained_variance: list[float]
    """1 - sum |x - x_hat|^2 / sum |x - mean x|^2 over test rows."""
    mcc_hungarian: list[float]
    l0: list[float]
    """Mean number of active latents per test row, at inference."""
    norm_error: float
    """Largest | |d_i| - 1 | over all decoder rows and seeds."""

    def mean(self, metric: str) -> float:
        return statistics.fmean(getattr(self, metric))

    def shown(self, metric: str) -> str:
        numbers = getattr(self, metric)
        sd = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
        return f"{statistics.fmean(numbers):.4f} ±{sd:.4f}"


def compare_quality(
    contest: Contest, peer: Peer, folder: Path, *, announce: Callable[[str], None]
) -> list[tuple[Quality, Quality]]:
    """Train each architecture with saebench and SAELens, for equal steps on the same rows: (ours, theirs).

    Rows are scaled to unit variance before training, so neither library scales them. Both use the same
    schedule and the same clipping (SAELens clips the gradient of its loss, which is d_in times ours, to norm
    1). Each architecture uses its best learning rate, by explained variance plus MCC of the first seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    truth = contest.world.sample(contest.test_rows, part="test")
    cache, scale = _write_rows(contest, folder)
    np.save(folder / "test.npy", (truth.x_ND * scale).numpy())
    pairs = []
    for name in THEIRS:
        announce(f"saebench {name}")
        ours = _train_ours(name, contest, cache, truth, scale, folder)
        announce(f"sae-lens {THEIRS[name]['architecture']}")
        pairs.append((ours, _train_theirs(name, contest, peer, truth, scale, folder)))
    return pairs


def _write_rows(contest: Contest, folder: Path) -> tuple[ActivationCache, float]:
    """Write the cache that saebench reads, and ``train.npy`` with the training rows of this cache."""
    n_rows = contest.tokens * HELD_OUT_SHARE // (HELD_OUT_SHARE - 1) + 1
    x_ND = contest.world.sample(n_rows).x_ND
    scale = float(x_ND.double().var(0, correction=0).mean().rsqrt())
    np.save(folder / "all.npy", (x_ND * scale).numpy())
    cache = import_activations(source=folder / "all.npy", out=folder / "cache", quiet=True)
    np.save(folder / "train.npy", cache.activations()[~cache.held_out].numpy())
    return cache, scale


def _train_ours(
    name: str, contest: Contest, cache: ActivationCache, truth: GroundTruth, scale: float, folder: Path
) -> Quality:
    def trained(grid: dict[str, Sequence[Any]], **settings: Any) -> list[dict[str, float]]:
        runs = sweep(
            grid,
            cache=cache.path,
            out=folder / f"{name}-{'-'.join(grid)}",
            sae=name,
            d_sae=contest.d_sae,
            k=contest.k,
            tokens=contest.tokens,
            batch_size=contest.batch_size,
            warmup=WARMUP,
            decay=DECAY,
            grad_clip=1 / truth.d_in,
            device="cpu",
            quiet=True,
            **settings,
        )
        return [_measure_run(run.sae, truth, scale) for run in runs]

    first, *others = contest.seeds
    by_rate = dict(zip(LEARNING_RATES, trained({"lr": LEARNING_RATES}, seed=first), strict=True))
    best = max(by_rate, key=lambda lr: _merit(by_rate[lr]))
    measured = [by_rate[best], *(trained({"seed": others}, lr=best) if others else [])]
    return _quality(f"saebench {name}", best, measured)


def _train_theirs(
    name: str, contest: Contest, peer: Peer, truth: GroundTruth, scale: float, folder: Path
) -> Quality:
    theirs: dict[str, Any] = {**THEIRS[name], "d_in": truth.d_in, "d_sae": contest.d_sae}
    theirs["max_iterations" if name == "matching-pursuit" else "k"] = contest.k
    n_steps = contest.tokens // contest.batch_size

    def trained(seed: int, lr: float) -> dict[str, float]:
        made = folder / f"{theirs['architecture']}-{seed}-{lr:g}"
        peer.ask(
            "train",
            data=str(folder / "train.npy"),
            folder=str(made),
            sae=theirs,
            batch_size=contest.batch_size,
            n_steps=n_steps,
            seed=seed,
            lr=lr,
            lr_warm_up_steps=round(WARMUP * n_steps),
            lr_decay_steps=round(DECAY * n_steps),
            dead_feature_window=n_steps // 10,
        )
        peer.ask("encode", folder=str(made), data=str(folder / "test.npy"), out=str(made))
        return _measure_folder(made, truth, scale)

    first, *others = contest.seeds
    by_rate = {lr: trained(first, lr) for lr in LEARNING_RATES}
    best = max(by_rate, key=lambda lr: _merit(by_rate[lr]))
    measured = [by_rate[best], *(trained(seed, best) for seed in others)]
    return _quality(f"sae-lens {theirs['architecture']}", best, measured)


@torch.no_grad()
def _measure_run(sae: SAE, truth: GroundTruth, scale: float) -> dict[str, float]:
    x_ND = truth.x_ND * scale
    codes = sae.encode(x_ND)
    return _measure(x_ND, sae.decode(codes), sae.W_dec, codes.l0().double().mean().item(), truth)


def _merit(numbers: dict[str, float]) -> float:
    return numbers["explained_variance"] + numbers["mcc_hungarian"]


def _measure_folder(made: Path, truth: GroundTruth, scale: float) -> dict[str, float]:
    from safetensors.torch import load_file

    codes_NM, x_hat_ND = (torch.from_numpy(np.load(made / f"{name}.npy")) for name in ("codes", "x_hat"))
    l0 = (codes_NM != 0).sum(1).double().mean().item()
    return _measure(truth.x_ND * scale, x_hat_ND, load_file(made / WEIGHTS_FILE)["W_dec"], l0, truth)


def _measure(
    x_ND: Tensor, x_hat_ND: Tensor, W_dec_MD: Tensor, l0: float, truth: GroundTruth
) -> dict[str, float]:
    error = (x_ND - x_hat_ND).double().square().sum()
    variance = (x_ND - x_ND.mean(0)).double().square().sum()
    return {
        "explained_variance": float(1 - error / variance),
        "mcc_hungarian": mcc_hungarian(absolute_cosines(W_dec_MD, truth.features_FD)),
        "l0": l0,
        "norm_error": float((W_dec_MD.double().norm(dim=1) - 1).abs().max()),
    }


def _quality(name: str, lr: float, measured: Sequence[dict[str, float]]) -> Quality:
    return Quality(
        name=name,
        lr=lr,
        explained_variance=[numbers["explained_variance"] for numbers in measured],
        mcc_hungarian=[numbers["mcc_hungarian"] for numbers in measured],
        l0=[numbers["l0"] for numbers in measured],
        norm_error=max(numbers["norm_error"] for numbers in measured),
    )
