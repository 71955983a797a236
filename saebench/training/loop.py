"""The training loop: read a batch, encode, decode, step; log, save, stop.

Shapes: N rows in a batch, D = d_in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saebench.activations.cache import ActivationCache, open_cache
from saebench.activations.loader import Loader
from saebench.config import SaeSpec, TrainConfig, architecture
from saebench.device import pick_device
from saebench.errors import UserError
from saebench.fields import from_flat, show_settings, to_flat
from saebench.files import directory_lock, human_bytes, require_disk
from saebench.progress import progress
from saebench.saes.base import MIN_DEAD_STEPS, SAE, Batch
from saebench.training import checkpoint, run
from saebench.training.checkpoint import TrainState
from saebench.training.interrupts import StopRequest
from saebench.training.metrics import step_metrics
from saebench.training.optimizer import learning_rate, make_optimizer, optimizer_step, peak_learning_rate
from saebench.training.run import Run
from saebench.training.sinks import open_sinks

SAMPLE_ROWS = 65_536
SAMPLE_BYTES = 1 << 28
STEP_PER_FORWARD = 1.5
"""A whole step costs about this many forward passes, since everything but the encoder's scan is sparse."""


def train(
    config: TrainConfig | PathLike[str] | str | None = None, spec: SaeSpec | None = None, /, **settings: Any
) -> Run:
    """Train an SAE on an activation cache and leave it in a run directory.

    Either ``train(TrainConfig(...), TopKSpec(...))`` or flat keywords, as on the command line:
    ``train(cache="cache", out="runs/a", sae="topk", d_sae=4096, k=32, tokens=5e6)``. Further keywords are
    the architecture's own (``saebench train --help --sae topk``), and the cache may stand first without its
    name.

    Killed at any instant and called again with ``resume=True``, it ends with the same bytes as a run that
    was never disturbed. Ctrl-C and SIGTERM save a checkpoint first.

    Raises:
        UserError: bad settings, a cache that does not fit, a directory in use, activations that are not
            finite, or a loss that diverged.
    """
    if not isinstance(config, TrainConfig):
        if spec is not None:
            raise TypeError("a spec goes with a TrainConfig; give keywords alone")
        config, spec = _from_keywords(settings if config is None else {"cache": config, **settings})
    elif settings:
        raise TypeError("train takes a TrainConfig and a spec, or keywords, not both")
    return _train(config, spec if spec is not None else architecture(config.sae).Spec())


show_settings(train, train, TrainConfig, SaeSpec)


def _train(config: TrainConfig, spec: SaeSpec) -> Run:
    out = config.out
    cache = open_cache(config.cache)
    hook = config.hook or cache.hooks[0]
    device = pick_device(config.device)
    n_steps = config.tokens // config.batch_size
    facts = _facts(config, spec, cache, hook, n_steps)
    loader = Loader(
        cache,
        hook,
        batch_size=config.batch_size,
        seed=config.seed,
        device=device,
        memory_bytes=int(config.memory * 2**30),
    )
    weight_bytes = 4 * (2 * spec.d_sae * cache.d_in(hook) + spec.d_sae + cache.d_in(hook))
    require_disk(out, 7 * weight_bytes, what=f"the run {out} (two checkpoints and the weights)")

    with (
        directory_lock(out, what="the run directory"),
        StopRequest() as stop,
        contextlib.ExitStack() as stack,
    ):
        run.check(out, facts, resume=config.resume)
        if run.is_finished(out):
            _say(f"{out} is finished: {n_steps:,} steps, nothing left to do", config)
            return Run(out, config, spec)

        state = _begin(config, spec, loader, device, n_steps, weight_bytes)
        facts = run.begin(out, facts)
        if latest := checkpoint.latest_checkpoint(out):
            checkpoint.load_checkpoint(latest, state)
        if config.resume:
            _say(f"resuming {out} at step {state.step:,} of {n_steps:,}", config)
        sinks = open_sinks(out, config, facts, step=state.step, stack=stack)
        sae, peak = state.sae, peak_learning_rate(config, spec.d_sae)
        first_step, started = state.step, time.monotonic()
        bad_rows = torch.zeros((), dtype=torch.bool, device=device)
        bar = stack.enter_context(
            progress(
                f"train {spec.name}",
                total=n_steps * config.batch_size,
                unit="tok",
                initial=first_step * config.batch_size,
                quiet=config.quiet,
            )
        )

        for rows in loader.iterate(start=state.step, stop=n_steps):
            x_ND = rows.activations.float() * state.scale
            bad_rows |= ~x_ND.isfinite().all()
            batch = Batch(x_ND, progress=state.step / n_steps)
            terms = sae.loss(batch)
            state.optimizer.zero_grad()
            terms.total.backward()  # type: ignore[no-untyped-call]
            lr = learning_rate(config, peak=peak, step=state.step, n_steps=n_steps)
            grad_norm = optimizer_step(sae, state.optimizer, lr=lr, grad_clip=config.grad_clip)
            sae.after_step(batch, terms)
            state.step += 1

            last = state.step == n_steps
            save = last or stop.signal is not None or state.step % config.checkpoint_every == 0
            log = last or state.step % config.log_every == 0
            note = ""
            if save or log:
                _check_finite(terms.total, bad_rows, state.step, lr, hook)
            if log:
                metrics = step_metrics(
                    sae,
                    terms,
                    x_ND,
                    step=state.step,
                    tokens=state.step * config.batch_size,
                    lr=lr,
                    grad_norm=grad_norm,
                )
                for sink in sinks:
                    sink.write(metrics)
                note = f"fvu {metrics['fvu']:.4f}  dead {metrics['dead']}"
            bar.update(config.batch_size, note)
            if save:
                checkpoint.save_checkpoint(out, state)
            if stop.signal is not None and not last:
                _log_session(out, first_step, state.step, config, time.monotonic() - started, device)
                _say(f"stopped at step {state.step:,} of {n_steps:,}; go on with --resume", config)
                stop.end()

        _log_session(out, first_step, state.step, config, time.monotonic() - started, device)
        sae.fold_scale(state.scale)
        sae.save(out, hook_name=hook, model=cache.model, tokens=n_steps * config.batch_size, seed=config.seed)
    return Run(out, config, spec)


def _begin(
    config: TrainConfig, spec: SaeSpec, loader: Loader, device: torch.device, n_steps: int, weight_bytes: int
) -> TrainState:
    """A fresh state: weights from the seed and from the first rows that the loader will give."""
    sample_ND = _sample(loader)
    d_in = sample_ND.shape[1]
    scale = _input_scale(sample_ND) if config.normalize else 1.0
    sae: SAE = architecture(spec.name)(spec, d_in).to(device)
    wanted = config.dtype if config.dtype != "auto" else ("bf16" if device.type == "cuda" else "fp32")
    sae.compute_dtype = torch.bfloat16 if wanted == "bf16" else torch.float32
    window = min(getattr(spec, "dead_tokens", sae.dead_after), config.tokens // 10)
    sae.dead_after = max(window, MIN_DEAD_STEPS * config.batch_size)
    sample_ND = sample_ND.to(device) * scale
    sae.initialize(Batch(sample_ND), seed=config.seed)

    sae(sample_ND[: config.batch_size])
    started = time.monotonic()
    sae(sample_ND[: config.batch_size]).sum().item()
    seconds = STEP_PER_FORWARD * (time.monotonic() - started) * n_steps
    working = 4 * weight_bytes + config.batch_size * (2 * spec.d_sae + 8 * d_in) * 4
    _say(
        f"{n_steps:,} steps of {config.batch_size:,} rows on {device} ({wanted}), "
        f"{config.tokens / max(loader.n_rows, 1):.1f} epochs of {loader.n_rows:,} rows; "
        f"about {human_bytes(working)} of memory beside the reader, {human_bytes(6 * weight_bytes)} of disk "
        f"while it runs, {max(1, math.ceil(seconds / 60))} min",
        config,
    )
    return TrainState(sae, make_optimizer(sae), scale)


def _sample(loader: Loader) -> Tensor:
    """The first rows of the training order in float32 on the CPU: 65,536, or fewer when they are wide."""
    first_ND = loader.batch(0).activations.float().cpu()
    n_rows = min(SAMPLE_ROWS, loader.n_rows, SAMPLE_BYTES // (4 * first_ND.shape[1]))
    others = [loader.batch(i).activations.float().cpu() for i in range(1, n_rows // loader.batch_size)]
    sample_ND = torch.cat([first_ND, *others])[:SAMPLE_ROWS]
    if not sample_ND.isfinite().all():
        raise UserError(
            f"activations at {loader.hook} hold NaN or infinity; harvest them again in another --dtype"
        )
    return sample_ND


def _input_scale(sample_ND: Tensor) -> float:
    """s with E |s (x - mean x)|^2 = d_in."""
    variance = sample_ND.double().var(0, correction=0).mean().item()
    if variance == 0:
        raise UserError(
            "all activations in the cache are equal, so there is nothing to learn; check the hook"
        )
    return 1 / math.sqrt(variance)


def _facts(
    config: TrainConfig, spec: SaeSpec, cache: ActivationCache, hook: str, n_steps: int
) -> dict[str, Any]:
    return {
        "format_version": run.FORMAT_VERSION,
        "train": {name: v for name, v in to_flat(config).items() if name not in run.OF_THE_CALL},
        "sae": {"name": spec.name, **to_flat(spec)},
        "d_in": cache.d_in(hook),
        "hook_name": hook,
        "model": cache.model,
        "cache_hash": cache.hash,
        "n_steps": n_steps,
    }


def _from_keywords(settings: dict[str, Any]) -> tuple[TrainConfig, SaeSpec]:
    spec_class = architecture(str(settings.get("sae", TrainConfig.sae))).Spec
    own = {field.name for field in dataclasses.fields(spec_class)}
    spec = from_flat(spec_class, {n: v for n, v in settings.items() if n in own}, source="the call of train")
    rest = {n: v for n, v in settings.items() if n not in own}
    return from_flat(TrainConfig, rest, source="the call of train"), spec


def _check_finite(loss: Tensor, bad_rows: Tensor, step: int, lr: float, hook: str) -> None:
    if bool(bad_rows):
        raise UserError(
            f"activations at {hook} hold NaN or infinity (seen by step {step}); "
            "harvest them again in another --dtype"
        )
    if not math.isfinite(loss.item()):
        raise UserError(
            f"the loss is {loss.item()} at step {step}: training diverged; lower --lr (now {lr:.2g})"
        )


def _log_session(
    out: Path, first: int, last: int, config: TrainConfig, seconds: float, device: torch.device
) -> None:
    """One line for each process that worked on the run: times live here, not among the metrics."""
    session = {
        "first_step": first,
        "last_step": last,
        "seconds": round(seconds, 3),
        "tokens_per_second": round((last - first) * config.batch_size / max(seconds, 1e-9)),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    with open(out / "sessions.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(session) + "\n")


def _say(text: str, config: TrainConfig) -> None:
    if not config.quiet:
        print(text, file=sys.stderr, flush=True)
