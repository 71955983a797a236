"""The training loop: read a batch, train every SAE on it, log, save, stop.

Shapes: N rows in a batch, D = d_in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch

from saebench.activations.cache import ActivationCache, open_cache
from saebench.activations.loader import Loader, side_by_side
from saebench.core.device import pick_device
from saebench.core.errors import UserError
from saebench.core.files import directory_lock, human_bytes, require_disk
from saebench.core.progress import progress
from saebench.core.refusals import resumes
from saebench.core.settings import show_settings, to_flat
from saebench.runs.layout import FORMAT_VERSION
from saebench.runs.provenance import ContextSettings
from saebench.runs.run import Run
from saebench.saes.base import Batch
from saebench.saes.registry import architecture
from saebench.saes.spec import SaeSpec, SiteWidth
from saebench.training import resume, state
from saebench.training.grid import Plan, grid_of, plan
from saebench.training.interrupts import StopRequest
from saebench.training.massive import norm_clip, warn
from saebench.training.settings import TrainConfig
from saebench.training.state import TrainingState, compute_dtype

SAMPLE_ROWS = 65_536
SAMPLE_BYTES = 1 << 28


def train(
    config: TrainConfig | PathLike[str] | str | None = None, spec: SaeSpec | None = None, /, **settings: Any
) -> Run:
    """Train an SAE on an activation cache and save it in a run directory.

    Either ``train(TrainConfig(...), TopKSpec(...))`` or flat keywords, as on the command line:
    ``train(cache="cache", out="runs/a", sae="topk", d_sae=4096, k=32, tokens=5e6)``. Further keywords are
    settings of the architecture (``saebench train --help --sae topk``), and the cache may be the first
    argument, without its name. For several SAEs in one pass see `sweep`.

    A run that was killed at any instant and is called again with ``resume=True`` ends with the same bytes as
    an uninterrupted run. Ctrl-C and SIGTERM save a checkpoint first.

    >>> made = sb.train(cache=cache, out="runs/a", d_sae=64, k=4, tokens=2_000, batch_size=200, quiet=True)
    >>> made.sae.W_dec.shape[0]
    64

    Raises:
        UserError: bad settings, a cache that does not fit, a directory in use, activations that are not
            finite, or a loss that diverged.
    """
    if isinstance(config, TrainConfig):
        if settings:
            raise TypeError("train takes a TrainConfig and a spec, or keywords, not both")
        plans = [(config, spec if spec is not None else architecture(config.sae).Spec())]
    else:
        if spec is not None:
            raise TypeError("a spec goes with a TrainConfig; give keywords alone")
        given = settings if config is None else {"cache": config, **settings}
        plans = plan(given, source="the call of train")
    if plans[0][0].sweep:
        raise UserError("train makes one SAE; for several call saebench.sweep({setting: values}, ...)")
    (trained,) = train_all(plans)
    return trained


show_settings(train, train, TrainConfig, SaeSpec)


def sweep(grid: Mapping[str, Sequence[Any]], /, **settings: Any) -> list[Run]:
    """Train every combination of a grid of settings in one pass over a cache: each batch is read once.

    ``sweep({"sae": ["topk", "mutual-choice"], "k": [16, 32]}, cache="cache", out="runs")`` leaves the runs
    runs/topk-k16, runs/topk-k32, ...; each has the bytes that `train` with its settings would leave (its own
    ``run.json`` says them), and its own resume. The grid may vary the architecture and its settings, lr,
    seed, warmup, decay, grad_clip and normalize; an architecture that lacks a setting is trained once for
    all its values. An SAE that diverges ends alone; the others go on.

    >>> common = {"cache": cache, "d_sae": 64, "tokens": 600, "batch_size": 200, "quiet": True}
    >>> runs = sb.sweep({"k": [2, 4]}, out="grid", **common)
    >>> [made.path.name for made in runs]
    ['k2', 'k4']

    Returns:
        The runs in grid order, the last named setting varying fastest.

    Raises:
        UserError: as `train`; and, once the others have finished, if any SAE diverged.
    """
    if settings.get("sweep"):
        raise UserError(f"sweep is {settings['sweep']!r} beside a grid; write its values into the grid")
    return train_all(plan(settings, grid_of(grid), source="the call of sweep"))


@resumes
def train_all(plans: Sequence[Plan]) -> list[Run]:
    """Train SAEs that read the same batches; see `sweep`."""
    common = plans[0][0]
    cache = open_cache(common.cache)
    plans = [(config, with_sites(spec, config, cache)) for config, spec in plans]
    sites = site_names(common, cache)
    device = pick_device(common.device)
    n_steps = common.tokens // common.batch_size
    with_gradients = any(architecture(spec.name).uses_gradients for _, spec in plans)
    for _, spec in plans:
        spec.check(batch_size=common.batch_size, n_steps=n_steps)
    loader = Loader(
        cache,
        sites,
        targets=common.target,
        batch_size=common.batch_size,
        seed=common.seed if common.order_seed is None else common.order_seed,
        gradients=with_gradients,
        device=device,
        memory_bytes=int(common.memory * 2**30),
    )
    d_in = sum(cache.d_in(site) for site in sites)
    weight_bytes = [_weight_bytes(spec, d_in) for _, spec in plans]
    for (config, _), n_bytes in zip(plans, weight_bytes, strict=True):
        require_disk(config.out, 7 * n_bytes, what=f"the run {config.out} (two checkpoints and the weights)")

    with contextlib.ExitStack() as stack:
        provenance = _provenance(cache, sites[0])
        clip, clipped, about_rows = norm_clip(common, cache, sites)
        facts = {
            config.out: _facts(config, spec, d_in, provenance, n_steps) | clipped for config, spec in plans
        }
        for config, _ in plans:
            stack.enter_context(directory_lock(config.out, what="the run directory"))
        stop = stack.enter_context(StopRequest())
        for config, _ in plans:
            resume.check(config.out, facts[config.out], resume=config.resume)
        trainings = []
        unfinished = [(config, spec) for config, spec in plans if not Run(config.out).is_finished]
        for config, _ in plans:
            if Run(config.out).is_finished:
                state.clean_up(config.out)
                _say(f"{config.out} is finished: {n_steps:,} steps, nothing left to do", common)
        if unfinished:
            warn(about_rows)
            sample = _sample(loader)
        for config, spec in unfinished:
            made = state.begin(
                config, spec, facts[config.out], sample, n_steps=n_steps, clip=clip, device=device,
                stack=stack,
            )  # fmt: skip
            if config.resume:
                _say(f"resuming {config.out} at step {made.current.step:,} of {n_steps:,}", common)
            trainings.append(made)
        if unfinished:
            _forecast(trainings, sample, loader, sum(weight_bytes), device)
        failed = _steps(trainings, loader, stop, device)
        finished = [training for training in trainings if training.finished]
        if finished:
            unseen = _unseen_rows(cache, sites, common.target, loader)
        for training in finished:
            training.finish(unseen, provenance, about_rows)
    if failed:
        others = "" if len(plans) == len(failed) else f" ({len(plans) - len(failed)} others finished)"
        more = f"; {len(failed) - 1} more diverged" if len(failed) > 1 else ""
        raise UserError(f"{failed[0]}{more}{others}")
    return [Run(config.out, config=config, spec=spec) for config, spec in plans]


def _steps(
    trainings: list[TrainingState], loader: Loader, stop: StopRequest, device: torch.device
) -> list[UserError]:
    """Take all remaining steps; returns the errors that ended SAEs before the end."""
    failed: list[UserError] = []
    active = [training for training in trainings if not training.finished]
    if not active:
        return failed
    common, n_steps = active[0].config, active[0].n_steps
    start = min(training.current.step for training in active)
    title = active[0].spec.name if len(active) == 1 else f"{len(active)} SAEs"
    bar = progress(
        f"train {title}",
        total=n_steps * common.batch_size,
        unit="tok",
        initial=start * common.batch_size,
        quiet=common.quiet,
    )
    with bar as shown:
        for i, rows in enumerate(loader.iterate(start=start, stop=n_steps), start):
            stopping, note = stop.signal is not None, ""
            for training in list(active):
                if training.current.step > i:  # its checkpoint is later than those of the others
                    continue
                try:
                    note = training.step(rows, stopping=stopping)
                except UserError as error:
                    failed.append(_why(error, loader, i, training))
                    active.remove(training)
                    training.log_session(device)
                    if len(trainings) > 1:
                        print(f"error: {failed[-1]}", file=sys.stderr, flush=True)
            shown.update(common.batch_size, note if len(trainings) == 1 else "")
            if not active:
                break
            if stopping and i + 1 < n_steps:
                for training in active:
                    training.log_session(device)
                    where = f"{training.config.out} " if len(trainings) > 1 else ""
                    _say(f"{where}stopped at step {i + 1:,} of {n_steps:,}; go on with --resume", common)
                stop.end()
    for training in active:
        training.log_session(device)
    return failed


def _why(error: UserError, loader: Loader, i: int, training: TrainingState) -> UserError:
    """The error that ended an SAE at batch i: that its rows are not finite, or else ``error``."""
    batch = training.first_step + int(training.n_finite_steps)
    if loader.batch(batch).activations.isfinite().all():
        return error
    return UserError(
        f"activations at {loader.hook} hold NaN or infinity (batch {batch}, step {batch + 1} of "
        f"{training.config.out}); harvest them again in another --dtype"
    )


def _sample(loader: Loader) -> Batch:
    """The first rows of the training order in float32 on the CPU: 65,536, or fewer if they are wide."""
    first = loader.batch(0)
    width = sum(column.shape[1] for column in (first.activations, first.targets) if column is not None)
    n_rows = min(SAMPLE_ROWS, loader.n_rows, SAMPLE_BYTES // (4 * width))
    batches = [first, *(loader.batch(i) for i in range(1, n_rows // loader.batch_size))]
    x_ND, gradient_ND, target_NE = (
        None if columns[0] is None else torch.cat([c.float().cpu() for c in columns])[:SAMPLE_ROWS]
        for columns in zip(*batches, strict=True)
    )
    assert x_ND is not None
    if not x_ND.isfinite().all() or not (target_NE is None or target_NE.isfinite().all()):
        raise UserError(
            f"activations at {loader.hook} hold NaN or infinity; harvest them again in another --dtype"
        )
    return Batch(x_ND, gradient_ND, target_NE=target_NE)


def _unseen_rows(
    cache: ActivationCache, sites: Sequence[str], targets: Sequence[str], loader: Loader
) -> Batch:
    """Held-out rows spread evenly over the cache, at most as many as `_sample` takes, on the device.

    Where no rows are held out, they are rows of the training order, with a warning.
    """
    row_N = cache.held_out.nonzero()[:, 0]
    width = sum(cache.d_in(site) for site in sites)
    n_rows = min(SAMPLE_ROWS, max(1, SAMPLE_BYTES // (4 * width)))
    if len(row_N) == 0:
        print(
            f"warning: {cache.path} has no held-out rows, so inference is calibrated on training rows",
            file=sys.stderr,
        )
        rows = loader.batch(0)
        return Batch(rows.activations, target_NE=rows.targets)
    if len(row_N) > n_rows:
        row_N = row_N[torch.arange(n_rows) * len(row_N) // n_rows]
    x_ND, target_NE = (
        side_by_side([cache.verified(site) for site in names], row_N).to(loader.device) if names else None
        for names in (sites, targets)
    )
    assert x_ND is not None
    return Batch(x_ND, target_NE=target_NE)


def _forecast(
    trainings: list[TrainingState], sample: Batch, loader: Loader, weight_bytes: int, device: torch.device
) -> None:
    """Print the expected time and memory, from a trial step of each SAE that is not applied."""
    common, n_steps = trainings[0].config, trainings[0].n_steps
    if common.quiet:
        return
    seconds, latents = 0.0, 0
    for training in trainings:
        batch = training.scaler.batch(sample[slice(0, common.batch_size)].to(device))
        for _ in range(2):  # the first one includes the cost of setting up
            started = time.monotonic()
            training.current.sae.loss(batch).total.backward()  # type: ignore[no-untyped-call]
            training.current.sae.b_dec.sum().item()
            trial = time.monotonic() - started
        training.current.optimizer.zero_grad()
        seconds += trial * (n_steps - training.current.step)
        latents = max(latents, training.spec.d_sae)
    working = 4 * weight_bytes + common.batch_size * (2 * latents + 8 * sample.x_ND.shape[1]) * 4
    _say(
        f"{n_steps:,} steps of {common.batch_size:,} rows on {device} ({compute_dtype(common, device)}), "
        f"{common.tokens / max(loader.n_rows, 1):.1f} epochs of {loader.n_rows:,} rows; "
        f"about {human_bytes(working)} of memory beside the reader, {human_bytes(6 * weight_bytes)} of disk "
        f"while it runs, {max(1, math.ceil(seconds / 60))} min",
        common,
    )


def site_names(config: TrainConfig, cache: ActivationCache) -> list[str]:
    """The sites that are read: those named; for a crosscoder all of the cache by default, else its first."""
    if config.hook:
        return [cache.resolve_hook(name) for name in config.hook]
    if not config.crosscoder:
        return cache.hooks[:1]
    if len(cache.hooks) == 1:
        raise UserError(f"--crosscoder joins several sites, but {cache.path} has {cache.hooks[0]} alone")
    return cache.hooks


def with_sites(spec: SaeSpec, config: TrainConfig, cache: ActivationCache) -> SaeSpec:
    """``spec`` with the sites and targets of a transcoder or crosscoder, and their widths in the cache."""
    if not config.target and not config.crosscoder:
        return spec
    architecture(spec.name).require_two_dictionaries()
    sites = tuple(SiteWidth(name, cache.d_in(name)) for name in site_names(config, cache))
    names = [cache.resolve_hook(name) for name in config.target]
    targets = tuple(SiteWidth(name, cache.d_in(name)) for name in names) or sites
    return dataclasses.replace(spec, sites=sites, targets=targets)


def _weight_bytes(spec: SaeSpec, d_in: int) -> int:
    d_out = sum(target.width for target in spec.targets) or d_in
    skip = d_in * d_out if spec.skip else 0
    return 4 * (spec.d_sae * (d_in + d_out) + spec.d_sae + d_out + skip)


def _provenance(cache: ActivationCache, hook: str) -> dict[str, Any]:
    """What run.json and sae.json record of where the SAE comes from."""
    contexts = ContextSettings.of_cache(cache)
    return {
        "hook_name": hook,
        "model": cache.model,
        "cache_hash": cache.hash,
        "contexts": contexts.to_json() if contexts is not None else None,
    }


def _facts(
    config: TrainConfig, spec: SaeSpec, d_in: int, provenance: dict[str, Any], n_steps: int
) -> dict[str, Any]:
    return {
        **provenance,
        "format_version": FORMAT_VERSION if spec.sites else 1,
        "train": {name: v for name, v in to_flat(config).items() if name not in resume.OF_THE_CALL},
        "sae": {"name": spec.name, **to_flat(spec)},
        "d_in": d_in,
        "n_steps": n_steps,
    }


def _say(text: str, config: TrainConfig) -> None:
    if not config.quiet:
        print(text, file=sys.stderr, flush=True)
