"""Entries of saebench for the CPU benchmark: a training step, and the matrix product of an encoder.

Shapes: N rows, D = d_in, M = d_sae latents, S = stored entries of codes.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from saebench.bench.timing import Timed
from saebench.saes.base import SAE, Batch
from saebench.saes.registry import architecture
from saebench.training.optimizer import make_optimizer, optimizer_step

LEARNING_RATE = 3e-4
"""SAELens's default; all entries use it."""


def step_of(name: str, rows_ND: Tensor, *, batch_size: int, d_sae: int, k: int) -> tuple[SAE, Timed]:
    """A new SAE and its training step: loss, backward, clipping, Adam, decoder norm, counters."""
    sae_class = architecture(name)
    sae: SAE = sae_class(sae_class.Spec(d_sae=d_sae, k=k), rows_ND.shape[1])
    sae.initialize(Batch(rows_ND[: 2 * batch_size]), seed=0)
    optimizer = make_optimizer(sae)
    is_finite = torch.ones((), dtype=torch.bool)
    batches = torch.split(rows_ND, batch_size)
    done = 0

    def step() -> float:
        nonlocal done
        start = time.perf_counter()
        batch = Batch(batches[done % len(batches)], progress=0.5)
        terms = sae.loss(batch)
        optimizer.zero_grad()
        terms.total.backward()  # type: ignore[no-untyped-call]
        optimizer_step(sae, optimizer, lr=LEARNING_RATE, grad_clip=1.0, is_finite=is_finite)
        with torch.no_grad():
            sae.after_step(batch, terms)
        done += 1
        return time.perf_counter() - start

    return sae, step


def encoder_product(rows_ND: Tensor, *, batch_size: int, d_sae: int) -> Timed:
    """The matrix product x W_enc alone, a lower bound for any encoder that evaluates every latent."""
    batches = torch.split(rows_ND, batch_size)
    W_enc_MD = torch.randn(d_sae, rows_ND.shape[1], generator=torch.Generator().manual_seed(1))
    out_NM = torch.empty(batch_size, d_sae)
    done = 0

    def product() -> float:
        nonlocal done
        start = time.perf_counter()
        torch.mm(batches[done % len(batches)], W_enc_MD.T, out=out_NM)
        done += 1
        return time.perf_counter() - start

    return product


@torch.no_grad()
def error_of(sae: SAE, batch: Batch) -> float:
    """Relative error of a training batch's reconstruction against float64 with the same latents.

    |x_hat - x_hat64| / |x_hat64| over all rows. For matching pursuit, the picks are applied in their order,
    and each coefficient is computed from the residual after the picks before it.
    """
    terms = sae.loss(batch)
    codes = terms.codes
    row_S, index_S, _ = codes.coo()
    W_dec_MD, b_dec_D = sae.W_dec.double(), sae.b_dec.double()
    centered_ND = batch.x_ND.double() - b_dec_D
    if sae.tied:
        residual_ND = centered_ND.clone()
        place_S = torch.arange(len(row_S)) - torch.searchsorted(row_S, row_S)
        for place in range(int(place_S.max()) + 1):
            rows, atoms = row_S[place_S == place], index_S[place_S == place].long()
            residual_rows, picked = residual_ND[rows], W_dec_MD[atoms]
            value = (residual_rows * picked).sum(1, keepdim=True)
            residual_ND[rows] = residual_rows - value * picked
        exact_ND = centered_ND - residual_ND + b_dec_D
    else:
        latents = index_S.long()
        exact_S = (centered_ND[row_S] * sae.W_enc_MD.double()[latents]).sum(1) + sae.b_enc.double()[latents]
        exact_ND = b_dec_D.expand_as(centered_ND).clone()
        exact_ND.index_add_(0, row_S, exact_S[:, None] * W_dec_MD[latents])
    x_hat_ND = batch.x_ND.double() - terms.error.double()
    return float((x_hat_ND - exact_ND).norm() / exact_ND.norm())
