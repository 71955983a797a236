"""One optimizer step: project the gradient of unit rows, clip, Adam, and give those rows unit norm again.

Shapes: M rows (latents), D = d_in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saebench_kernels.dispatch import is_fused
from saebench_kernels.rounded import kept_copy


def adam_step(
    optimizer: torch.optim.Adam,
    *,
    lr: float | Tensor,
    grad_clip: float,
    unit_rows: Tensor | None = None,
    project: bool = False,
    is_finite: Tensor | None = None,
) -> Tensor:
    """Apply the gradients of the parameters of ``optimizer``, all float32.

    Fused (see dispatch.py), a step is two passes over the parameters, on the moments that ``optimizer``
    keeps; the second pass also writes the copies that `rounded` keeps. Neither form waits for the GPU.

    Args:
        lr: the learning rate; a float64 scalar tensor where the step is captured in a CUDA graph.
        grad_clip: the largest norm of the whole gradient; 0 does not clip.
        unit_rows: the parameter [M, D] whose rows get unit norm after the step, or None.
        project: before anything else, remove from the gradient of each of these rows its part along the row.
        is_finite: scalar bool on the device of the parameters. It becomes False when the gradient is not
            finite; while it is False, no update is applied.

    Returns:
        The norm of the whole gradient before clipping, a scalar tensor.
    """
    first = optimizer.param_groups[0]["params"][0]
    step = (
        adam_step_fused
        if is_fused("adam_step", first.device, torch.float32, floats=True)
        else adam_step_eager
    )
    return step(
        optimizer, lr=lr, grad_clip=grad_clip, unit_rows=unit_rows, project=project, is_finite=is_finite
    )


def adam_step_eager(
    optimizer: torch.optim.Adam,
    *,
    lr: float | Tensor,
    grad_clip: float,
    unit_rows: Tensor | None = None,
    project: bool = False,
    is_finite: Tensor | None = None,
) -> Tensor:
    """`adam_step` by torch's own Adam."""
    (group,) = optimizer.param_groups
    group["lr"] = float(lr)
    if project and unit_rows is not None and unit_rows.grad is not None:
        project_rows_(unit_rows.grad, unit_rows)
    norm = torch.nn.utils.clip_grad_norm_(group["params"], grad_clip or math.inf)
    if is_finite is not None:
        is_finite &= norm.isfinite()
        optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]  # what GradScaler sets, too
    optimizer.step()
    if unit_rows is not None:
        normalize_rows_(unit_rows)
    return norm


@torch.no_grad()
def adam_step_fused(
    optimizer: torch.optim.Adam,
    *,
    lr: float | Tensor,
    grad_clip: float,
    unit_rows: Tensor | None = None,
    project: bool = False,
    is_finite: Tensor | None = None,
) -> Tensor:
    """`adam_step` by fused kernels."""
    from saebench_kernels.fused.adam import adam_coefficients, fused_adam, gradient_squares, n_pieces

    (group,) = optimizer.param_groups
    device = group["params"][0].device
    grads = {p: p.grad.contiguous() for p in group["params"] if p.grad is not None}
    projected = unit_rows if project else None
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
            unit_rows=parameter is unit_rows,
            low=kept_copy(parameter),
        )
    return norm


@torch.no_grad()
def project_rows_(grad_MD: Tensor, rows_MD: Tensor) -> None:
    """Remove from each row of ``grad`` its part along the row (of unit norm), in place."""
    along_M1 = (grad_MD * rows_MD).sum(1, keepdim=True)
    grad_MD.sub_(along_M1 * rows_MD)


@torch.no_grad()
def normalize_rows_(rows_MD: Tensor) -> None:
    """Give every row unit norm, in place; rows of zeros stay."""
    rows_MD.div_(rows_MD.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny))
