"""The gain of a sweep: several SAEs in one pass over a cache, compared with separate runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saebench.activations.importing import HELD_OUT_SHARE, import_activations
from saebench.bench.settings import BenchConfig
from saebench.training import sweep, train

SEEDS = (0, 1, 2, 3)
STEPS = 16
ORDER = ("separate", "together", "together", "separate")
SWEEP_PARTS = 1 + 2 * len(ORDER)
"""How often ``announce`` is called: for the cache, and for each measurement at two widths."""
NARROW = 16
"""Factor between the two widths; at a smaller width, reading a batch takes a larger share of the time."""


@dataclass(frozen=True, kw_only=True)
class SweepGain:
    """Seconds of the training loops without start-up, each the mean of two measurements."""

    d_sae: int
    n_saes: int
    n_steps: int
    separate: float
    """Seconds of separate runs, one after the other."""
    together: float
    """Seconds of one pass with all SAEs."""

    @property
    def gain(self) -> float:
        return self.separate / self.together


def sweep_gains(config: BenchConfig, folder: Path, *, announce: Callable[[str], None]) -> list[SweepGain]:
    """Measure TopK SAEs with different seeds, at the width of the benchmark and at a smaller one.

    The cache is bf16, as harvested caches are, and is read from the page cache.
    """
    announce("cache of the sweep")
    rng = np.random.default_rng(0)
    n_rows = STEPS * config.batch_size * HELD_OUT_SHARE // (HELD_OUT_SHARE - 1) + 1
    rows_ND = rng.standard_normal((n_rows, config.d_in), dtype=np.float32)
    np.save(folder / "sweep.npy", rows_ND)
    cache = folder / "cache"
    import_activations(source=folder / "sweep.npy", out=cache, dtype="bf16", shard_rows=32_768, quiet=True)
    gains = []
    for d_sae in (config.d_sae, max(config.k, config.d_sae // NARROW)):
        settings = {
            "cache": cache,
            "sae": "topk",
            "d_sae": d_sae,
            "k": config.k,
            "batch_size": config.batch_size,
            "tokens": STEPS * config.batch_size,
            "order_seed": 0,
            "device": "cpu",
            "quiet": True,
        }
        taken: dict[str, list[float]] = {"separate": [], "together": []}
        for place, how in enumerate(ORDER):
            announce(f"{how}, {d_sae} latents")
            out = folder / f"{how}-{d_sae}-{place}"
            if how == "together":
                runs = [run.path for run in sweep({"seed": list(SEEDS)}, out=out, **settings)]
                taken[how].append(
                    min(_seconds(runs))
                )  # all end together; the last one to begin includes no start-up
            else:
                runs = [train(out=out / str(seed), seed=seed, **settings).path for seed in SEEDS]
                taken[how].append(sum(_seconds(runs)))
        gains.append(
            SweepGain(
                d_sae=d_sae,
                n_saes=len(SEEDS),
                n_steps=STEPS,
                **{how: sum(seconds) / len(seconds) for how, seconds in taken.items()},
            )
        )
    return gains


def _seconds(runs: Sequence[Path]) -> list[float]:
    """Seconds from the first to the last step of each run, from its sessions.jsonl."""
    sessions = [json.loads((run / "sessions.jsonl").read_text(encoding="utf-8")) for run in runs]
    return [float(session["seconds"]) for session in sessions]
