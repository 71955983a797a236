"""Metrics of a training step, computed from its batch alone."""

from __future__ import annotations

import torch
from torch import Tensor

from saebench.saes.base import SAE, LossTerms


def step_metrics(
    sae: SAE, terms: LossTerms, x_ND: Tensor, *, step: int, tokens: int, lr: float, grad_norm: Tensor
) -> dict[str, float]:
    """The metrics of one step. Reading them waits for the device, so this is called every ``log_every``
    steps.

    ``fvu`` = sum |x - x_hat|^2 / sum |x - mean x|^2 over the batch, NaN where the rows do not vary (a single
    one, or all equal), ``l0`` = mean number of different active latents per row, ``dead`` = latents that have
    not fired for ``sae.dead_after`` tokens; ``loss``, ``aux`` and the architecture's own: see LossTerms.
    """
    with torch.no_grad():
        variance = (x_ND - x_ND.mean(0)).square().sum()
        fvu = terms.error.float().square().sum() / torch.where(variance > 0, variance, torch.nan)
        codes = terms.codes
        l0 = codes.l0().double().mean() if sae.spec.repeats else codes.firings().sum() / max(1, codes.n_rows)
        dead = (sae.tokens_since_fired >= sae.dead_after).sum()
        scalars = [terms.total.detach(), terms.auxiliary, fvu, l0, dead, grad_norm, *terms.extra.values()]
        numbers = torch.stack([scalar.double() for scalar in scalars]).tolist()
    loss, aux, fvu_value, l0_value, n_dead, norm, *extra = numbers
    return {
        "step": step,
        "tokens": tokens,
        "loss": loss,
        "aux": aux,
        "fvu": fvu_value,
        "l0": l0_value,
        "dead": int(n_dead),
        "grad_norm": norm,
        "lr": lr,
        **dict(zip(terms.extra, extra, strict=True)),
    }
