"""The entries of saebench for the GPU benchmark: the bare matrix product, encoders and training steps.

Shapes: B batches of N rows, D = d_in, M = d_sae latents, S = stored entries of codes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from saebench.activations.loader import Rows
from saebench.bench.gpu_sizes import Make, Once, Size
from saebench.bench.gpu_timing import Graph
from saebench.bench.steps import LEARNING_RATE
from saebench.saes.base import Batch
from saebench.saes.registry import architecture
from saebench.saes.spec import SiteWidth
from saebench.training.settings import TrainConfig
from saebench.training.state import STEPS_BETWEEN_REFRESHES, TrainingState, fresh_sae
from saebench_kernels import gradient_topk_encode, mutual_choice_encode, topk_encode

DEAD_SHARE = 20
"""In the entry with AuxK, one latent in this many is dead."""
TOPK, PURSUIT = "topk step", "matching-pursuit step"


def product(size: Size, rows_BND: Tensor) -> Once:
    W_MD = torch.randn(size.d_sae, size.d_in, device=rows_BND.device).bfloat16()
    out_NM = torch.empty(size.batch_size, size.d_sae, dtype=torch.bfloat16, device=rows_BND.device)
    return lambda: torch.mm(rows_BND[0], W_MD.T, out=out_NM)


def _weights(size: Size, device: torch.device) -> tuple[torch.nn.Parameter, Tensor]:
    W_MD = torch.randn(size.d_sae, size.d_in, device=device) / size.d_in**0.5
    return torch.nn.Parameter(W_MD), torch.zeros(size.d_sae, device=device)


def _topk(size: Size, rows_BND: Tensor) -> Once:
    x_ND = rows_BND[0]
    W_MD, b_M = _weights(size, x_ND.device)
    return Graph(lambda: topk_encode(x_ND, W_MD, b_M, size.k, scan_dtype=torch.bfloat16))


def _gradient(size: Size, rows_BND: Tensor) -> Once:
    x_ND = rows_BND[0]
    (W_MD, b_M), (D_MD, _) = _weights(size, x_ND.device), _weights(size, x_ND.device)
    g_ND = torch.randn_like(x_ND)
    return Graph(
        lambda: gradient_topk_encode(x_ND, g_ND, W_MD, D_MD, b_M, size.k, 1.0, scan_dtype=torch.bfloat16)
    )


def _mutual_choice(size: Size, rows_BND: Tensor) -> Once:
    x_ND = rows_BND[0]
    W_MD, b_M = _weights(size, x_ND.device)
    budget = size.k * size.batch_size
    values_S, _, _ = mutual_choice_encode(
        x_ND, W_MD, b_M, budget, torch.zeros((), device=x_ND.device), scan_dtype=torch.bfloat16
    )
    hint = 0.95 * values_S.min()
    return Graph(lambda: mutual_choice_encode(x_ND, W_MD, b_M, budget, hint, scan_dtype=torch.bfloat16))


ENCODERS: dict[str, Make] = {
    "topk encode": _topk,
    "gradient encode": _gradient,
    "mutual-choice encode": _mutual_choice,
}


def _step(name: str, *, dead: bool = False, transcoder: bool = False, skip: bool = False) -> Make:
    """A training step of architecture ``name``; with ``dead``, one latent in 20 never fires.

    A ``transcoder`` reads a batch and writes the next one, which is as wide.
    """

    def make(size: Size, rows_BND: Tensor) -> Once:
        sae_class, device = architecture(name), rows_BND.device
        spec = sae_class.Spec(d_sae=size.d_sae, k=size.k)
        targets_BND = rows_BND.roll(1, 0) if transcoder else None
        if transcoder:
            sites, targets = (SiteWidth("in", size.d_in),), (SiteWidth("out", size.d_in),)
            spec = dataclasses.replace(spec, sites=sites, targets=targets, skip=skip)
        config = TrainConfig(
            cache=Path("cache"), out=Path("out"), sae=name, batch_size=size.batch_size,
            tokens=size.batch_size * 1_000_000, normalize=False, dtype="bf16",
        )  # fmt: skip
        gradients_BND = torch.randn_like(rows_BND) if sae_class.uses_gradients else None
        sample = Batch(
            rows_BND[0].float(),
            None if gradients_BND is None else gradients_BND[0].float(),
            target_NE=None if targets_BND is None else targets_BND[0].float(),
        )
        training = TrainingState(
            config=config,
            spec=spec,
            facts={},
            current=fresh_sae(config, spec, sample, device),
            n_steps=1_000_000,
            sinks=[],
            is_finite=torch.ones((), dtype=torch.bool, device=device),
            n_finite_steps=torch.zeros((), dtype=torch.int64, device=device),
            first_step=0,
        )
        if dead:
            sae = training.current.sae
            with torch.no_grad():  # too weak for the k largest, but positive for half of the rows
                sae.W_enc_MD[::DEAD_SHARE] *= 1e-3
            sae.tokens_since_fired[::DEAD_SHARE] = sae.dead_after

        def once() -> None:
            step = training.current.step
            if step % STEPS_BETWEEN_REFRESHES == 0:
                training.current.sae.refresh_dead()
            at = step % len(rows_BND)
            gradients, targets = (c if c is None else c[at] for c in (gradients_BND, targets_BND))
            rows = Rows(rows_BND[at], gradients, targets)
            training.graphed_step(rows, 0.5, LEARNING_RATE)
            training.current.step += 1

        return once

    return make


STEPS: dict[str, Make] = {
    TOPK: _step("topk"),
    "topk step, 5% dead": _step("topk", dead=True),
    "mutual-choice step": _step("mutual-choice"),
    "gradient step": _step("gradient"),
    "transcoder step": _step("topk", transcoder=True),
    "transcoder step with skip": _step("topk", transcoder=True, skip=True),
    PURSUIT: _step("matching-pursuit"),
}
