"""Learning rate by width and step, and one optimizer step in the one order that is right."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saebench.saes.base import SAE
from saebench.training.settings import TrainConfig
from saebench_kernels import is_fused, kept_copy


def peak_learning_rate(config: TrainConfig, d_sae: int) -> float:
    """The configured rate, or for 'auto' 1.6e-3 / sqrt(d_sae / 4096): wider dictionaries want smaller steps.

    The 1 / sqrt(d_sae) law is that of the public TopK trainers. The constant is from a sweep on the demo's
    cache (781 steps; widths 1024 to 16384): half of it leaves 1 to 2 points of explained variance, twice as
    much gains less than 2 and leaves up to 10% of the latents dead. Runs of many more steps can do with less.
    """
    return 1.6e-3 / math.sqrt(d_sae / 4096) if config.lr == "auto" else float(config.lr)


def learning_rate(config: TrainConfig, *, peak: float, step: int, n_steps: int) -> float:
    """Rate of the 0-based ``step``: a linear rise, a plateau, a linear fall that ends just above 0."""
    rise, fall = config.warmup * n_steps, config.decay * n_steps
    up = (step + 1) / rise if rise else 1.0
    down = (n_steps - step) / fall if fall else 1.0
    return peak * min(1.0, up, down)


def make_optimizer(sae: SAE) -> torch.optim.Adam:
    """Adam on the fp32 masters; epsilon as in Gao et al. 2024, since gradients of wide SAEs are tiny."""
    return torch.optim.Adam(sae.parameters(), lr=0.0, betas=(0.9, 0.999), eps=6.25e-10, fused=True)


def optimizer_step(
    sae: SAE,
    optimizer: torch.optim.Adam,
    *,
    lr: float | Tensor,
    grad_clip: float,
    is_finite: Tensor | None = None,
) -> Tensor:
    """Project the decoder's gradient, clip the norm of all of it, Adam, renormalize the decoder.

    ``is_finite`` (scalar bool, on the device of the weights) becomes False when the gradient is not finite;
    while it is False, no update is applied. The decision is made on the device, without synchronization.
    Returns the norm before clipping, a scalar tensor (reading it waits for the device).
    """
    if is_fused("fused_adam", sae.b_dec.device, torch.float32, floats=True):
        return _fused_step(sae, optimizer, lr=lr, grad_clip=grad_clip, is_finite=is_finite)
    for group in optimizer.param_groups:
        group["lr"] = float(lr)
    sae.project_gradients()
    norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), grad_clip or math.inf)
    if is_finite is not None:
        is_finite &= norm.isfinite()
        optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]  # what GradScaler sets, too
    optimizer.step()
    sae.normalize_decoder()
    return norm


@torch.no_grad()
def _fused_step(
    sae: SAE, optimizer: torch.optim.Adam, *, lr: float | Tensor, grad_clip: float, is_finite: Tensor | None
) -> Tensor:
    """The same in two passes over the parameters, on the moments that the optimizer keeps."""
    from saebench_kernels.fused.adam import adam_coefficients, fused_adam, gradient_squares, n_pieces

    group, device = optimizer.param_groups[0], sae.b_dec.device
    grads = {p: p.grad.contiguous() for p in sae.parameters() if p.grad is not None}
    projected = sae.W_dec if sae.projects_gradients else None
    sizes = [n_pieces(grad, whole_rows=p is projected) for p, grad in grads.items()]
    squares = torch.empty(sum(sizes), device=device)
    for (p, grad), out in zip(grads.items(), torch.split(squares, sizes), strict=True):
        gradient_squares(grad, unit=p if p is projected else None, out=out)
    for parameter in grads:
        if not (state := optimizer.state[parameter]):
            state["step"] = torch.zeros((), device=device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
    steps = [optimizer.state[parameter]["step"] for parameter in grads]
    if is_finite is None:
        is_finite = torch.ones((), dtype=torch.bool, device=device)
    if not isinstance(lr, Tensor):
        lr = torch.full((), lr, dtype=torch.float64, device=device)
    coefficients_4, norm = adam_coefficients(
        squares, steps[0], is_finite, lr, betas=group["betas"], grad_clip=grad_clip
    )
    torch._foreach_add_(steps, [coefficients_4[3]] * len(steps))
    for parameter, grad in grads.items():
        state = optimizer.state[parameter]
        fused_adam(
            parameter,
            state["exp_avg"],
            state["exp_avg_sq"],
            grad,
            coefficients_4,
            betas=group["betas"],
            eps=group["eps"],
            project=parameter is projected,
            unit_rows=parameter is sae.W_dec,
            low=kept_copy(parameter),
        )
    return norm
