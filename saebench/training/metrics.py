"""Metrics of a training step, computed from its batch alone."""

from __future__ import annotations

import torch
from torch import Tensor

from saebench.saes.base import SAE, Batch, LossTerms

MISSED_L0 = 0.05
"""Relative difference between the mean L0 at inference and k above which there is a warning."""
FINAL_ROWS = 4096
"""Most held-out rows on which the result of a training is checked."""
MOST_DEAD = 0.9


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


@torch.no_grad()
def result_warnings(sae: SAE, unseen: Batch, *, l0: float | None, lr: float) -> list[str]:
    """What is wrong with a trained SAE, one sentence each, to be read after its name; [] where all is well.

    Args:
        unseen: scaled rows that it was not trained on.
        l0: what `SAE.calibrate` returned.
        lr: the peak learning rate.
    """
    found = []
    rows = unseen[:: max(1, -(-len(unseen.x_ND) // FINAL_ROWS))]
    y_NE = rows.y_NE
    codes = sae.encode(rows.x_ND)
    error = (y_NE - sae.decode(codes, rows.x_ND)).double().square().sum()
    variance = (y_NE - y_NE.mean(0)).double().square().sum()
    fvu = float(error / variance) if variance > 0 else 0.0
    on = f"on {len(y_NE):,} held-out rows"
    if not fvu < 1:
        found.append(
            f"reconstructs worse than the mean activation does: its fraction of variance unexplained is "
            f"{fvu:.3g} {on}, that of the mean is 1; lower --lr (now {lr:.2g}) or train on more tokens"
        )
    n_firing = int((codes.firings() > 0).sum())
    if n_firing == 0:
        found.append(f"has no latent that is active {on}; lower --lr (now {lr:.2g}) or raise --k")
    n_dead = int((sae.tokens_since_fired >= sae.dead_after).sum())
    if n_firing and n_dead > MOST_DEAD * sae.d_sae:
        found.append(
            f"has {n_dead:,} dead latents of {sae.d_sae:,} (none of them was active in the last "
            f"{sae.dead_after:,} tokens); lower --lr (now {lr:.2g}) or --d-sae"
        )
    if l0 is not None and abs(l0 / sae.k - 1) > MISSED_L0:
        found.append(
            f"has a mean L0 of {l0:.4g}, the target is k = {sae.k}: thresholds cannot reach it; lower --k"
        )
    return found
