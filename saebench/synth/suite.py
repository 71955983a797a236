"""``synth``: make synthetic data, train SAEs on it in one pass, measure recovery, and test claims."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from saebench.core.device import pick_device
from saebench.core.errors import UserError
from saebench.core.files import directory_lock
from saebench.core.settings import accepts_settings, to_flat
from saebench.runs.run import Run, load
from saebench.saes.spec import SaeSpec
from saebench.synth.claims import claims
from saebench.synth.data import DataSet, claim_directory, data_sets, make_cache
from saebench.synth.measure import measure
from saebench.synth.report import SynthReport, provenance, write_report
from saebench.synth.scores import Score
from saebench.synth.settings import SynthConfig
from saebench.synth.variants import Variant, variants
from saebench.training.grid import Plan
from saebench.training.loop import train_all
from saebench.training.settings import TrainConfig

STEPS_BETWEEN_CHECKPOINTS = 500
ROW_ORDER_SEED = 0


@accepts_settings(SynthConfig)
def synth(config: SynthConfig) -> SynthReport:
    """Train SAEs on synthetic data with known features, measure recovery, and test the papers' claims.

    Writes the run directories ``out``/DATA/runs/NAME-seedS, ``out``/results.json and ``out``/results.md. All
    SAEs of one data set are trained on the same batches in one pass; seeds change only the initial weights.
    Trainings that an earlier call finished are not repeated, so a later call can add architectures, data or
    seeds.

    Raises:
        UserError: ``out`` holds data with other settings, or a training or measurement fails.
    """
    scores: list[Score] = []
    troubles: list[str] = []
    with directory_lock(config.out, what="the suite"):
        for data in data_sets(config.data, full=config.full, tokens=config.tokens):
            chosen = variants(config.architectures, data)
            troubles += _train(data, chosen, config)
            scores += _measure(data, chosen, config)
        report = SynthReport(
            scores=scores,
            claims=claims(scores),
            troubles=troubles,
            provenance=provenance(config),
        )
        write_report(report, config.out)
    return report


def _train(data: DataSet, chosen: Sequence[Variant], config: SynthConfig) -> list[str]:
    """Train the SAEs that are not trained yet; returns the errors of trainings that failed."""
    directory = config.out / data.name
    plans = [_plan(data, variant, seed, config) for variant in chosen for seed in range(config.seeds)]
    claim_directory(data, directory)
    if all(_is_trained(training.out, spec) for training, spec in plans):
        _say(f"{data.name}: already trained", config)
        return []
    make_cache(data, directory, quiet=config.quiet)
    _say(f"{data.name}: {len(plans)} SAEs", config)
    try:
        with _threads(data):
            train_all(plans)
    except UserError as error:
        if not any(_is_trained(training.out, spec) for training, spec in plans):
            raise
        return [f"{data.name}: {error}"]
    return []


def _plan(data: DataSet, variant: Variant, seed: int, config: SynthConfig) -> Plan:
    run = _run(data, variant, seed, config.out)
    training = TrainConfig(
        cache=config.out / data.name / "cache",
        out=run,
        sae=variant.sae,
        tokens=data.tokens,
        batch_size=data.batch_size,
        seed=seed,
        order_seed=ROW_ORDER_SEED,
        checkpoint_every=STEPS_BETWEEN_CHECKPOINTS,
        resume=run.exists(),
        device=config.device,
        quiet=config.quiet,
    )
    return training, variant.spec(data)


def _measure(data: DataSet, chosen: Sequence[Variant], config: SynthConfig) -> list[Score]:
    truth = data.world.sample(data.test_rows, part="test")
    device = pick_device(config.device)
    scores = []
    for variant in chosen:
        runs = [_run(data, variant, seed, config.out) for seed in range(config.seeds)]
        saes = [load(run, device=device) for run in runs if _is_trained(run, variant.spec(data))]
        for inference in variant.inferences if saes else ():
            found = [measure(sae, truth, data.kind, inference=inference) for sae in saes]
            values = {metric: [numbers[metric] for numbers in found] for metric in found[0]}
            label = variant.name if len(variant.inferences) == 1 else f"{variant.name} ({inference})"
            scores.append(Score(data=data.name, sae=label, k=data.k, test_rows=data.test_rows, values=values))
    return scores


@contextlib.contextmanager
def _threads(data: DataSet) -> Iterator[None]:
    """Use one thread for the tree, whose arrays are too small for several threads."""
    before = torch.get_num_threads()
    if data.kind == "tree":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(data: DataSet, variant: Variant, seed: int, out: Path) -> Path:
    return out / data.name / "runs" / f"{variant.name}-seed{seed}"


def _is_trained(run: Path, spec: SaeSpec) -> bool:
    """Whether the run is finished.

    Raises:
        UserError: the run was trained with other settings.
    """
    if not Run(run).is_finished:
        return False
    if Run(run).description()["spec"] != to_flat(spec):
        raise UserError(f"{run} was trained with other settings of {spec.name}; choose another --out")
    return True


def _say(text: str, config: SynthConfig) -> None:
    if not config.quiet:
        print(text, file=sys.stderr, flush=True)
