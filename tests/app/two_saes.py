"""A small store with two SAEs, and their runs beside it, as `saebench demo` leaves them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.store.small_store import HOOK, build_small_store, small_sae

SEEDS = {"small": 0, "other": 1}
METRICS = [
    {"step": step, "tokens": 10 * step, "fvu": 1 / step, "l0": 4.0, "dead": 0} for step in (1, 2, 3, 4)
]
SESSION = {
    "first_step": 0,
    "last_step": 4,
    "seconds": 2.0,
    "tokens_per_second": 20,
    "device": "<b>cpu</b>",
    "torch": "2",
    "kernels": "eager",
}


def build_two(folder: Path, *, runs: bool = True) -> Path:
    """``folder``/store, and with ``runs`` also ``folder``/runs/small and /other."""
    store = folder / "store"
    for name, seed in SEEDS.items():
        build_small_store(store, name=name, seed=seed)
        if runs:
            run = folder / "runs" / name
            small_sae(seed).save(run, hook_name=HOOK, model=None)
            write_metrics(run)
    return store


def write_metrics(run: Path, n: int = len(METRICS)) -> None:
    """The metrics of a run that is finished or in training: ``n`` lines."""
    run.mkdir(parents=True, exist_ok=True)
    facts = {"format_version": 1, "train": {"cache": "none"}, "sae": {"name": "topk"}, "cache_hash": "0"}
    (run / "run.json").write_text(json.dumps(facts), "utf-8")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS[:n]), "utf-8")
    (run / "sessions.jsonl").write_text(json.dumps(SESSION) + "\n", "utf-8")
