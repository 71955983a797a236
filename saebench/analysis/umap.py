"""Layouts of directions in the plane: by principal axes, and by UMAP.

The implementation of UMAP is deterministic for a seed and uses torch alone.

Shapes: M rows of unit norm, D dimensions, J neighbors, E edges, R repelled points.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saebench.store.geometry import nearest_rows

SPREAD_A, SPREAD_B = 1.577, 0.8951
"""a and b of the curve 1 / (1 + a d^(2b)) for UMAP's min_dist 0.1 and spread 1."""
REPELLED = 5
"""Number of random points that repel the first end of an edge each time the edge is sampled."""
LONGEST_STEP = 4.0
START_SIZE = 10.0
MANY_ROWS = 2_000


def principal_layout(unit_MD: Tensor) -> Tensor:
    """[M, 2] float32: the centered rows on the two axes of largest variance.

    The sign of an axis is chosen so that its coefficient of largest magnitude is positive, which makes the
    layout unique.
    """
    centered_MD = unit_MD.double() - unit_MD.double().mean(0)
    axes_D2 = torch.linalg.eigh(centered_MD.T @ centered_MD).eigenvectors[:, -2:].flip(1)
    if axes_D2.shape[1] < 2:
        axes_D2 = torch.nn.functional.pad(axes_D2, (0, 2 - axes_D2.shape[1]))
    largest_2 = axes_D2.gather(0, axes_D2.abs().argmax(dim=0, keepdim=True))[0]
    points_M2: Tensor = centered_MD @ (axes_D2 * torch.where(largest_2 < 0, -1.0, 1.0))
    return points_M2.float()


def umap_layout(unit_MD: Tensor, n_neighbors: int, *, seed: int, rounds: int | None = None) -> Tensor:
    """[M, 2] float32: UMAP (McInnes et al. 2018) of the rows by 1 - cosine; deterministic.

    The graph is that of UMAP, computed from exact neighbors. The layout is computed in rounds. In each round
    all points move at once, by the mean of the forces that UMAP would apply one after the other, so that a
    round consists of operations on whole tensors.
    """
    first_E, second_E, weight_E = fuzzy_graph(unit_MD, min(n_neighbors, len(unit_MD) - 1))
    generator = torch.Generator().manual_seed(seed)
    points_M2 = principal_layout(unit_MD)
    points_M2 = START_SIZE * points_M2 / points_M2.abs().max().clamp_min(1e-12)
    points_M2 += 1e-2 * torch.randn(points_M2.shape, generator=generator)  # so that equal rows can separate
    rounds = rounds or (200 if len(unit_MD) > MANY_ROWS else 500)
    chance_E = weight_E / weight_E.max()
    for i in range(rounds):
        sampled = torch.rand(len(chance_E), generator=generator) < chance_E
        first, second = first_E[sampled], second_E[sampled]
        pushed_R = first.repeat_interleave(REPELLED)
        from_R = torch.randint(len(points_M2), (len(pushed_R),), generator=generator)
        force_M2 = torch.zeros_like(points_M2)
        force_M2.index_add_(0, first, _attraction(points_M2[first] - points_M2[second]))
        force_M2.index_add_(0, pushed_R, _repulsion(points_M2[pushed_R] - points_M2[from_R]))
        times_M = torch.bincount(first, minlength=len(points_M2)).clamp_min(1)
        points_M2 += (1 - i / rounds) * force_M2 / times_M[:, None]
    return points_M2 - points_M2.mean(0)


def fuzzy_graph(unit_MD: Tensor, n_neighbors: int) -> tuple[Tensor, Tensor, Tensor]:
    """Edges ``(i, j, weight)`` [E], in both directions: UMAP's union of the fuzzy neighbor sets of the rows.

    With distances d_ij = 1 - cos, the weights in the set of row i are exp(-max(0, d_ij - rho_i) / sigma_i),
    where rho_i is its smallest distance above 0, and sigma_i is chosen so that the J weights sum to
    log2(J + 1). The union of w_ij and w_ji is w_ij + w_ji - w_ij w_ji.
    """
    other_MJ, cosine_MJ = nearest_rows(unit_MD, n_neighbors)
    n, n_neighbors = other_MJ.shape
    distance_MJ = (1 - cosine_MJ.double()).clamp_min(0)
    positive_MJ = torch.where(distance_MJ > 1e-7, distance_MJ, torch.inf)
    rho_M1 = positive_MJ.min(dim=1, keepdim=True).values.nan_to_num(posinf=0.0)
    beyond_MJ = (distance_MJ - rho_M1).clamp_min(0)
    sigma_M1 = _widths(beyond_MJ, math.log2(n_neighbors + 1))
    member_MJ = torch.exp(-beyond_MJ / sigma_M1)
    row_E = torch.arange(n).repeat_interleave(n_neighbors)
    other_E, member_E = other_MJ.reshape(-1), member_MJ.reshape(-1)
    keys = torch.cat([row_E * n + other_E, other_E * n + row_E])
    edges, place = torch.unique(keys, return_inverse=True)
    ours, theirs = place.tensor_split(2)
    forth, back = (
        torch.zeros(len(edges), dtype=torch.float64).index_add_(0, at, member_E) for at in (ours, theirs)
    )
    weight = (forth + back - forth * back).float()
    return edges.div(n, rounding_mode="floor"), edges % n, weight


def _widths(beyond_MJ: Tensor, target: float) -> Tensor:
    """sigma [M, 1] by bisection: the sum of exp(-beyond / sigma) increases with sigma."""
    low_M1 = torch.full((len(beyond_MJ), 1), 1e-6, dtype=torch.float64)
    high_M1 = torch.full_like(low_M1, 1e3)
    for _ in range(64):
        middle_M1 = (low_M1 * high_M1).sqrt()
        too_much = torch.exp(-beyond_MJ / middle_M1).sum(1, keepdim=True) > target
        high_M1 = torch.where(too_much, middle_M1, high_M1)
        low_M1 = torch.where(too_much, low_M1, middle_M1)
    return high_M1


def _attraction(apart_E2: Tensor) -> Tensor:
    squared_E1 = apart_E2.square().sum(1, keepdim=True).clamp_min(1e-12)
    slope_E1 = -2 * SPREAD_A * SPREAD_B * squared_E1.pow(SPREAD_B - 1) / (1 + SPREAD_A * squared_E1**SPREAD_B)
    return (slope_E1 * apart_E2).clamp_(-LONGEST_STEP, LONGEST_STEP)


def _repulsion(apart_R2: Tensor) -> Tensor:
    """A point does not repel itself: there the distance is 0."""
    squared_R1 = apart_R2.square().sum(1, keepdim=True)
    slope_R1 = 2 * SPREAD_B / ((0.001 + squared_R1) * (1 + SPREAD_A * squared_R1**SPREAD_B))
    return (slope_R1 * apart_R2).clamp_(-LONGEST_STEP, LONGEST_STEP)
