"""The learning rate for a width and a step, the optimizer, and one optimizer step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saebench.saes.base import SAE
from saebench.training.settings import TrainConfig
from saebench_kernels import adam_step


def peak_learning_rate(config: TrainConfig, d_sae: int) -> float:
    """The configured rate, or for 'auto' 1.6e-3 / sqrt(d_sae / 4096): wider dictionaries need smaller steps.

    The 1 / sqrt(d_sae) law is that of the public TopK trainers. The constant is from a sweep on the demo's
    cache (781 steps; widths 1024 to 16384): half of it leaves 1 to 2 points of explained variance, twice as
    much gains less than 2 and leaves up to 10% of the latents dead. Runs of many more steps can use less.
    """
    return 1.6e-3 / math.sqrt(d_sae / 4096) if config.lr == "auto" else float(config.lr)


def learning_rate(config: TrainConfig, *, peak: float, step: int, n_steps: int) -> float:
    """Rate of the 0-based ``step``: a linear rise, a plateau, a linear fall that ends just above 0."""
    rise, fall = config.warmup * n_steps, config.decay * n_steps
    up = (step + 1) / rise if rise else 1.0
    down = (n_steps - step) / fall if fall else 1.0
    return peak * min(1.0, up, down)


def make_optimizer(sae: SAE) -> torch.optim.Adam:
    """Adam on the fp32 weights; epsilon as in Gao et al. 2024, since gradients of wide SAEs are tiny."""
    return torch.optim.Adam(sae.parameters(), lr=0.0, betas=(0.9, 0.999), eps=6.25e-10, fused=True)


def optimizer_step(
    sae: SAE,
    optimizer: torch.optim.Adam,
    *,
    lr: float | Tensor,
    grad_clip: float,
    is_finite: Tensor | None = None,
) -> Tensor:
    """One step of Adam on all parameters; see `saebench_kernels.adam_step.adam_step`.

    Projects the decoder's gradient, clips the norm of the whole gradient, applies Adam, and gives the
    decoder's rows unit norm. ``is_finite`` (scalar bool, on the device of the weights) becomes False when the
    gradient is not finite; while it is False, no update is applied. Returns the norm before clipping, a
    scalar tensor (reading it waits for the device).
    """
    return adam_step(
        optimizer,
        lr=lr,
        grad_clip=grad_clip,
        unit_rows=sae.W_dec if sae.unit_norm_decoder else None,
        project=sae.projects_gradients,
        is_finite=is_finite,
    )
