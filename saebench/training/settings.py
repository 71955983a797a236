"""Settings of a training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from saebench.core.bounds import Above, AtLeast, Seed
from saebench.core.errors import UserError
from saebench.core.settings import ADDED_LATER, ONE_OR_MORE, Settings
from saebench.saes.registry import architectures

ComputeDtype = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Train a sparse autoencoder on cached activations."""

    cache: Path
    """Directory of the activation cache."""
    out: Path
    """Directory of the run."""
    hook: tuple[str, ...] = field(default=(), metadata=ONE_OR_MORE)
    """Site of the cache that is read, a TransformerLens hook name or a module path; by default the first.
    Repeat it to read several, side by side."""
    target: tuple[str, ...] = field(default=(), metadata=ADDED_LATER)
    """Site that is reconstructed from it: trains a transcoder. Repeat it for several, side by side."""
    crosscoder: bool = field(default=False, metadata=ADDED_LATER)
    """Read and reconstruct several sites together, with one set of latents."""
    sae: str = "topk"
    """Architecture: topk, matching-pursuit, mutual-choice (BatchTopK; also: batchtopk), feature-choice,
    gradient, matryoshka, jumprelu, gated, relu, or one that another installed package adds."""
    tokens: Annotated[int, AtLeast(1)] = 5_000_000
    """Rows to train on; the cache is repeated as often as needed."""
    batch_size: Annotated[int, AtLeast(1)] = 4096
    """Rows in a step."""
    lr: Annotated[float | Literal["auto"], Above(0)] = "auto"
    """Peak learning rate; 'auto' is 1.6e-3 / sqrt(d_sae / 4096)."""
    warmup: Annotated[float, AtLeast(0)] = 0.05
    """Fraction of the steps, at the start, in which the learning rate rises from 0."""
    decay: Annotated[float, AtLeast(0)] = 0.3
    """Fraction of the steps, at the end, in which the learning rate falls to 0."""
    grad_clip: Annotated[float, AtLeast(0)] = 1.0
    """Largest norm of the gradient of all parameters; 0 disables clipping."""
    normalize: bool = True
    """Scale inputs to a mean variance of 1 per dimension; the scale is folded into the saved weights."""
    clip_norm: Annotated[float | Literal["auto"], AtLeast(0)] = field(default="auto", metadata=ADDED_LATER)
    """Scale rows whose norm is above this multiple of the median norm down to the median norm, in training
    only; 0 leaves all rows as they are; 'auto' is 10 where few such rows hold much of the variance."""
    seed: Seed = 0
    """Seed of the initial weights, and of the order of the rows unless order_seed is given."""
    order_seed: Seed | None = None
    """Seed of the order of the rows; by default seed."""
    sweep: tuple[str, ...] = ()
    """NAME=VALUE,VALUE,...: train one SAE for each value in one pass over the cache, each in a directory of
    its own in --out; repeat for a grid, like --sweep sae=topk,relu --sweep k=16,32."""
    dtype: ComputeDtype = "auto"
    """Type of the matrix products; weights stay fp32. 'auto' is bf16 on a GPU and fp32 on a CPU."""
    checkpoint_every: Annotated[int, AtLeast(1)] = 1000
    """Steps between checkpoints."""
    log_every: Annotated[int, AtLeast(1)] = 50
    """Steps between lines of metrics."""
    resume: bool = False
    """Continue an interrupted run with the same settings."""
    memory: Annotated[float, AtLeast(0.01)] = 1.0
    """GiB of memory that the shuffling reader may use."""
    tensorboard: bool = False
    """Also write TensorBoard event files into the run directory."""
    wandb: str | None = None
    """Also log to this Weights & Biases project."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda' or 'cuda:1'."""
    quiet: bool = False
    """No progress display."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sae", architectures.canonical(self.sae, flag="--sae"))
        for name in ("hook", "target"):
            value = getattr(self, name)
            if value is None or isinstance(value, str):  # as a single value was given before
                object.__setattr__(self, name, (value,) if value else ())
        self._check_sites()
        if self.tokens < self.batch_size:
            raise UserError(
                f"tokens is {self.tokens:,} but one step takes batch_size = {self.batch_size:,}; "
                "lower --batch-size or raise --tokens"
            )
        if isinstance(self.clip_norm, float | int) and 0 < self.clip_norm < 1:
            raise UserError(
                f"--clip-norm is {self.clip_norm:g} times the median norm, so it would change ordinary rows; "
                "give 0 or a multiple of at least 1"
            )
        if self.warmup + self.decay > 1:
            raise UserError(
                f"warmup {self.warmup} and decay {self.decay} are shares of one run and exceed it"
            )

    def _check_sites(self) -> None:
        for flag, names in (("--site", self.hook), ("--target", self.target)):
            if len(set(names)) != len(names):
                raise UserError(f"{flag} names the same site twice: {', '.join(names)}")
        if self.crosscoder and self.target:
            raise UserError(
                "a crosscoder reconstructs the sites that it reads; leave --target or --crosscoder out"
            )
        if self.crosscoder and len(self.hook) == 1:
            raise UserError(f"--crosscoder joins several sites, but --site names {self.hook[0]} alone")
        if len(self.hook) > 1 and not self.crosscoder and not self.target:
            raise UserError(
                "--site names several sites; pass --crosscoder to reconstruct them together, or --target to "
                "reconstruct another site"
            )
        if self.target and self.target == self.hook:
            raise UserError(
                f"--target is the site that is read, {', '.join(self.target)}; leave it out for an SAE"
            )
