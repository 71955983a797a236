"""The training of one SAE: its state, one step, what it writes, and how it ends.

The loop (loop.py) reads batches and passes each to every `TrainingState`; they are independent of each other.

Shapes: N rows in a batch, D = d_in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saebench.activations.loader import Rows
from saebench.core.errors import UserError
from saebench.core.files import append_line, remove_leftovers
from saebench.runs.layout import SESSIONS_FILE
from saebench.runs.warnings import write_warnings
from saebench.saes.base import SAE, Batch
from saebench.saes.registry import architecture
from saebench.saes.scales import NormClip, Scaler, Scales
from saebench.saes.spec import SaeSpec
from saebench.training import checkpoint, resume
from saebench.training.checkpoint import SaeInTraining
from saebench.training.cuda_graph import GraphedStep, StepOutput
from saebench.training.metrics import result_warnings, step_metrics
from saebench.training.optimizer import learning_rate, make_optimizer, optimizer_step, peak_learning_rate
from saebench.training.settings import TrainConfig
from saebench.training.sinks import Sink, open_sinks

STEPS_BETWEEN_REFRESHES = 32
"""Steps between two calls of `SAE.refresh_dead` on a GPU."""


@dataclass(eq=False)
class TrainingState:
    """Made by `begin`. ``current.step`` steps have been taken, ``n_steps`` are to be."""

    config: TrainConfig
    spec: SaeSpec
    facts: dict[str, Any]
    current: SaeInTraining
    n_steps: int
    sinks: list[Sink]
    is_finite: Tensor
    """Scalar bool on the device: whether every step of this session so far was finite."""
    n_finite_steps: Tensor
    """Scalar int64 on the device: number of steps of this session before the first that was not finite."""
    first_step: int
    clip: NormClip = field(default_factory=NormClip)
    graphed_step: GraphedStep = field(init=False)
    scaler: Scaler = field(init=False)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.graphed_step = GraphedStep(self.update, self.current.sae.graph_key)
        self.scaler = Scaler(self.current.scales, self.spec, self.is_finite.device, self.clip)

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.current.step == self.n_steps

    def step(self, rows: Rows, *, stopping: bool) -> str:
        """Train on one batch; log and save where the settings say so, or when the training is ``stopping``.

        A step whose loss or gradient is not finite is not applied, and neither is any later one; this is
        detected when metrics are read or a checkpoint is due. Returns a note for the progress display.

        Raises:
            UserError: a step, or the weights after it, were not finite; the step is not counted.
        """
        current, config, sae = self.current, self.config, self.current.sae
        peak = peak_learning_rate(config, self.spec.d_sae)
        lr = learning_rate(config, peak=peak, step=current.step, n_steps=self.n_steps)
        if not sae.uses_gradients:
            rows = rows._replace(gradients=None)
        if rows.activations.is_cuda and current.step % STEPS_BETWEEN_REFRESHES == 0:
            sae.refresh_dead()
        batch, terms, grad_norm = self.graphed_step(rows, current.step / self.n_steps, lr)
        done = current.step + 1
        save = done == self.n_steps or stopping or done % config.checkpoint_every == 0
        log = done == self.n_steps or done % config.log_every == 0
        note = ""
        if save or log:
            self._check_finite(lr)
        if save:
            self._check_weights(lr)
        current.step = done
        if log:
            tokens = current.step * config.batch_size
            metrics = step_metrics(
                sae, terms, batch.y_NE, step=current.step, tokens=tokens, lr=lr, grad_norm=grad_norm
            )
            for sink in self.sinks:
                sink.write(metrics)
            note = f"fvu {metrics['fvu']:.4f}  dead {metrics['dead']}"
        if save:
            for sink in self.sinks:
                sink.sync()
            checkpoint.save_checkpoint(config.out, current)
        return note

    def update(self, rows: Rows, progress: float, lr: float | Tensor) -> StepOutput:
        """Loss, gradients, optimizer step and statistics of one batch; does not wait for the GPU unless the
        SAE does."""
        current, sae = self.current, self.current.sae
        unscaled = Batch(rows.activations, rows.gradients, progress, target_NE=rows.targets)
        batch = self.scaler.batch(unscaled)
        terms = sae.loss(batch)
        current.optimizer.zero_grad()
        terms.total.backward()  # type: ignore[no-untyped-call]
        self.is_finite &= terms.total.isfinite()
        grad_norm = optimizer_step(
            sae, current.optimizer, lr=lr, grad_clip=self.config.grad_clip, is_finite=self.is_finite
        )
        self.n_finite_steps += self.is_finite
        with torch.no_grad():
            sae.after_step(batch, terms)
        # Without its autograd graph, whose nodes would tie a later capture to the current stream.
        return StepOutput(batch, dataclasses.replace(terms, total=terms.total.detach()), grad_norm)

    def finish(self, unseen: Batch, provenance: dict[str, Any], about_rows: list[str]) -> None:
        """Calibrate on held-out rows of the cache, undo the scaling of the input, and save the SAE.

        ``about_rows``: what was said of the rows before the training, which warnings.json keeps.
        """
        current, config = self.current, self.config
        # As inference computes: thresholds found from rounded products would be those of other codes.
        current.sae.compute_dtype = torch.float32
        unseen = self.scaler.batch(unseen)
        with torch.no_grad():
            l0 = current.sae.calibrate(unseen.x_ND)
        found = result_warnings(current.sae, unseen, l0=l0, lr=peak_learning_rate(config, self.spec.d_sae))
        for sentence in found:
            print(f"warning: {config.out} {sentence}", file=sys.stderr)
        # On the CPU, where checkpoints are folded too: a GPU divides by a scalar with other rounding.
        current.sae.to("cpu").fold_scales(current.scales.sites, current.scales.targets)
        tokens = self.n_steps * config.batch_size
        write_warnings(config.out, [*found, *about_rows])
        current.sae.save(config.out, **provenance, tokens=tokens, seed=config.seed)

    def log_session(self, device: torch.device) -> None:
        """Append one line per process that worked on the run. Times are written here and not into the
        metrics."""
        seconds = time.monotonic() - self.started
        n_steps = self.current.step - self.first_step
        session = {
            "first_step": self.first_step,
            "last_step": self.current.step,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(n_steps * self.config.batch_size / max(seconds, 1e-9)),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "kernels": "fused" if self.current.sae.trains_fused(self.config.batch_size) else "eager",
        }
        append_line(self.config.out / SESSIONS_FILE, json.dumps(session))

    def _check_finite(self, lr: float) -> None:
        if not self.is_finite:
            batch = self.first_step + int(self.n_finite_steps)
            kept = checkpoint.latest_checkpoint(self.config.out)
            kept_at = f"the checkpoint {kept.name} is kept" if kept else "there is no checkpoint before it"
            way_out = f"lower --lr (now {lr:.2g})"
            if batch == 0:  # no learning rate has had an effect yet
                way_out = "the scale of the activations may be the reason, " + (
                    "harvest them again or look for outliers in the cache"
                    if self.config.normalize
                    else "drop --no-normalize"
                )
            raise UserError(
                f"training diverged: the loss or its gradient is not finite at step {batch + 1} of "
                f"{self.config.out} (batch {batch}); that step was not applied and {kept_at}; {way_out}"
            )

    def _check_weights(self, lr: float) -> None:
        """Refuse weights or moments of Adam that are not finite; a finite gradient may still overflow
        them."""
        current = self.current
        moments = [moment for kept in current.optimizer.state.values() for moment in kept.values()]
        tensors = [*current.sae.state_dict().values(), *moments]
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise UserError(
                f"training diverged: the weights or the moments of Adam are not finite after step "
                f"{current.step + 1} of {self.config.out}; lower --lr (now {lr:.2g})"
            )


def begin(
    config: TrainConfig,
    spec: SaeSpec,
    facts: dict[str, Any],
    sample: Batch,
    *,
    n_steps: int,
    clip: NormClip,
    device: torch.device,
    stack: contextlib.ExitStack,
) -> TrainingState:
    """The state of a training in a checked run directory: from the seed and ``sample``, or the last
    checkpoint.

    ``sample`` holds unscaled rows of the cache. Sinks are closed with ``stack``.
    """
    current = fresh_sae(config, spec, clip.batch(sample, spec), device)
    facts = resume.begin(config.out, facts)
    if checkpoint.restore_latest(config.out, current) and device.type == "cuda":
        current.sae.refresh_dead(reuse=True)
    return TrainingState(
        config=config,
        spec=spec,
        facts=facts,
        current=current,
        n_steps=n_steps,
        sinks=open_sinks(config.out, config, facts, step=current.step, stack=stack),
        is_finite=torch.ones((), dtype=torch.bool, device=device),
        n_finite_steps=torch.zeros((), dtype=torch.int64, device=device),
        first_step=current.step,
        clip=clip,
    )


def clean_up(run: Path) -> None:
    """Delete what the process that finished a run left if it was killed on the way: temporary files, and
    checkpoints before the last."""
    remove_leftovers(run)
    if latest := checkpoint.latest_checkpoint(run):
        checkpoint.keep_only(latest)


def compute_dtype(config: TrainConfig, device: torch.device) -> str:
    """'fp32' or 'bf16': the type of matrix products on this device."""
    if config.dtype != "auto":
        return config.dtype
    return "bf16" if device.type == "cuda" else "fp32"


def fresh_sae(config: TrainConfig, spec: SaeSpec, sample: Batch, device: torch.device) -> SaeInTraining:
    """The SAE before the first step: weights from the seed and ``sample``, unscaled rows of the cache."""
    unit = Scales.of_sample(sample.x_ND, sample.target_NE, spec)  # also checks that all sites vary
    scales = unit if config.normalize else Scales.ones(spec)
    sae: SAE = architecture(spec.name)(spec, sample.x_ND.shape[1]).to(device)
    sae.configure_training(
        compute_dtype=torch.bfloat16 if compute_dtype(config, device) == "bf16" else torch.float32,
        tokens=config.tokens,
        batch_size=config.batch_size,
    )
    if not sae.uses_gradients:
        sample = dataclasses.replace(sample, gradient_ND=None)
    sae.initialize(Scaler(scales, spec, device).batch(sample.to(device)), seed=config.seed)
    return SaeInTraining(sae, make_optimizer(sae), scales)
