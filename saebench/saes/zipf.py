"""Zipf's law for the firing frequencies of latents, and integer budgets that follow it.

Shapes: M = d_sae latents, L live latents, C candidate shifts.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

DEFAULT_EXPONENT = 1.0


class ZipfLaw(NamedTuple):
    """Frequency proportional to (rank + shift)^-exponent: Zipf for shift 0, Zipf-Mandelbrot above."""

    exponent: float
    shift: float

    def log_weights(self, n: int) -> Tensor:
        """[n] float64: of the ranks 1 to n, up to a constant. The weights themselves could underflow."""
        return -self.exponent * (torch.arange(1, n + 1, dtype=torch.float64) + self.shift).log()


def fit_zipf(
    density_L: Tensor,
    *,
    exponent: float | None = None,
    shift: float | None = None,
    by: Literal["density", "rank"] = "density",
) -> ZipfLaw:
    """The law that fits positive densities best, by least squares of log density on log (rank + shift).

    With ``by="density"``, a latent's weight is its density, so that every match has the same weight; with
    ``by="rank"``, every latent has the same weight, and the many rare ones decide. A parameter that is given
    stays fixed. The shift is searched among 0, 1, 2, 4, ... up to about the number of densities; for each,
    the best exponent (at least 0) has a closed form. With fewer than 3 densities, the exponent is 1 and the
    shift 0.
    """
    n_live = density_L.numel()
    if n_live < 3:
        return ZipfLaw(DEFAULT_EXPONENT if exponent is None else exponent, shift or 0.0)
    doubling = [0.0, *(2.0**i for i in range(n_live.bit_length()))]
    shift_C = torch.tensor(doubling if shift is None else [shift], dtype=torch.float64)
    density_L = density_L.double().cpu().sort(descending=True).values
    weight_L = density_L if by == "density" else torch.ones_like(density_L)
    weight_L = weight_L / weight_L.sum()
    y_L = density_L.log()
    t_CL = (torch.arange(1, n_live + 1) + shift_C[:, None]).log()
    y_L, t_CL = y_L - weight_L @ y_L, t_CL - (t_CL @ weight_L)[:, None]
    if exponent is None:
        # 0 / 0 where a shift is so large that all ranks are equal: then the exponent has no effect.
        exponent_C = (-(t_CL * y_L) @ weight_L / (t_CL.square() @ weight_L)).nan_to_num(0.0).clamp_min(0)
    else:
        exponent_C = torch.full_like(shift_C, exponent)
    error_C = (y_L + exponent_C[:, None] * t_CL).square() @ weight_L
    best = int(error_C.argmin())
    return ZipfLaw(float(exponent_C[best]), float(shift_C[best]))


@functools.lru_cache(maxsize=8)
def budgets_by_rank(law: ZipfLaw, n: int, *, total: int, floor: int, cap: int) -> tuple[Tensor, Tensor]:
    """The share of ``total`` matches of each of ``n`` ranks: exact in float64, and rounded to integers.

    See `share_out` and `round_to_sum`. The results are cached: do not modify them.
    """
    expected = share_out(law.log_weights(n), total=total, floor=floor, cap=cap)
    return expected, round_to_sum(expected, total)


def share_out(log_weights_M: Tensor, *, total: int, floor: int, cap: int) -> Tensor:
    """float64 [M] proportional to the weights, each clamped to [floor, cap]; they sum to ``total``.

    This is clamp(c weights, floor, cap) for the c that gives the sum, found by bisection of log c.

    Raises:
        ValueError: the total is not between M floor and M cap.
    """
    n = log_weights_M.numel()
    if not n * floor <= total <= n * cap:
        raise ValueError(f"{n} budgets between {floor} and {cap} cannot sum to {total}")
    low = math.log(max(floor, 1e-9)) - float(log_weights_M.max()) - 1.0
    high = math.log(cap) - float(log_weights_M.min()) + 1.0
    for _ in range(100):
        middle = (low + high) / 2
        if float((log_weights_M + middle).exp().clamp(floor, cap).sum()) < total:
            low = middle
        else:
            high = middle
    return (log_weights_M + high).exp().clamp(floor, cap)


def round_to_sum(expected_M: Tensor, total: int) -> Tensor:
    """int64 [M] that sum to ``total``: the largest remainders are rounded up, of equal ones the first."""
    whole_M = expected_M.floor()
    missing = total - int(whole_M.sum())
    order_M = torch.sort(expected_M - whole_M, descending=True, stable=True).indices
    whole_M[order_M[:missing]] += 1
    return whole_M.long()
