"""Geometry of decoder directions: a map in the plane, clusters, and redundancy.

Decoder rows are normalized to unit norm first.

Shapes: M = d_sae latents, D = d_in, C clusters, B latents of a block, P pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saebench.analysis.attach import decoder_rows, read_sae
from saebench.analysis.umap import principal_layout, umap_layout
from saebench.core.deprecation import renamed_arguments
from saebench.core.errors import UserError
from saebench.saes.base import SAE

if TYPE_CHECKING:
    import pandas as pd

METHODS = ("pca", "umap")
BLOCK_BYTES = 2**27
MOST_PAIRS = 5_000_000
MOST_ROUNDS = 100


@dataclass(frozen=True)
class Redundancy:
    """The result of `redundancy`."""

    pairs: pd.DataFrame
    """feature, other, cosine: pairs of latents (feature < other) whose cosine is at least ``threshold``, the
    largest first."""
    threshold: float
    share: float
    """The fraction of latents that are in such a pair."""
    effective_rank: float
    """exp(-sum p log p), p = s / sum s, with s the singular values of the unit decoder rows (Roy and Vetterli
    2007): the number of dimensions that they span effectively, at most d_in."""
    participation_ratio: float
    """(sum s^2)^2 / sum s^4: a similar number, dominated by the large singular values."""

    def __repr__(self) -> str:
        return (
            f"Redundancy({len(self.pairs):,} pairs at {self.threshold:g} or more, {self.share:.1%} of the "
            f"latents, effective rank {self.effective_rank:.1f}, "
            f"participation ratio {self.participation_ratio:.1f})"
        )


@torch.no_grad()
@renamed_arguments(neighbours="neighbors")
def decoder_map(
    sae: SAE | str | PathLike[str],
    method: str = "pca",
    *,
    n_clusters: int = 8,
    neighbors: int = 15,
    seed: int = 0,
) -> pd.DataFrame:
    """Map of the latents in the plane: feature, x, y, cluster.

    By 'pca' the points are the unit decoder rows projected to their first two principal axes. This is exact,
    but two axes show only a small part of many directions. By 'umap' near directions become near points, by a
    torch implementation of UMAP's objective (McInnes et al. 2018, arXiv 1802.03426) on the exact nearest
    neighbors by cosine, initialized with the principal axes. There the neighbors of a point are meaningful;
    large distances are not. ``cluster`` is that of `clusters`, computed from the directions, not from the
    points.

    >>> points = sb.decoder_map(run, n_clusters=4)
    >>> points.columns.tolist(), len(points) == sb.load(run).d_sae
    (['feature', 'x', 'y', 'cluster'], True)

    Args:
        sae: a run directory, or an SAE in memory.
        method: 'pca' or 'umap'.
        n_clusters: number of clusters; 0 is the largest one.
        neighbors: number of nearest neighbors of each latent that 'umap' uses.
        seed: seed of the clusters and of 'umap'; equal seeds give equal results.

    Raises:
        UserError: no such SAE, weights with NaN or infinity, fewer than 3 latents, or a setting outside its
            bounds.
    """
    if method not in METHODS:
        raise UserError(f"method is {method!r}; give {' or '.join(map(repr, METHODS))}")
    if neighbors < 2:
        raise UserError(f"neighbors is {neighbors}; give at least 2")
    unit_MD = _directions(sae)
    if len(unit_MD) < 3:
        raise UserError(f"the SAE has {len(unit_MD)} latents, but a map needs at least 3; give a wider SAE")
    found = _clustered(unit_MD, n_clusters, seed)
    points_M2 = principal_layout(unit_MD) if method == "pca" else umap_layout(unit_MD, neighbors, seed=seed)
    found.insert(1, "x", points_M2[:, 0].numpy())
    found.insert(2, "y", points_M2[:, 1].numpy())
    return found[["feature", "x", "y", "cluster"]]


@torch.no_grad()
def clusters(sae: SAE | str | PathLike[str], n: int = 32, *, seed: int = 0) -> pd.DataFrame:
    """Group the latents by direction: feature, cluster, cosine (with the mean direction of its cluster).

    Spherical k-means, initialized by greedy k-means++ with 1 - cosine as the distance, and run until no
    latent changes its cluster. Clusters are numbered by size, 0 is the largest; none is empty.

    >>> found = sb.clusters(run, 4)
    >>> found["cluster"].value_counts().is_monotonic_decreasing
    True

    Args:
        sae: a run directory, or an SAE in memory.
        n: number of clusters, at most the number of latents.
        seed: seed of the initialization; equal seeds give equal results.

    Raises:
        UserError: no such SAE, weights with NaN or infinity, or more clusters than latents.
    """
    return _clustered(_directions(sae), n, seed)


@torch.no_grad()
def redundancy(sae: SAE | str | PathLike[str], *, threshold: float = 0.9) -> Redundancy:
    """Pairs of latents with nearly the same decoder direction, and the effective rank of all directions.

    >>> found = sb.redundancy(run, threshold=0.5)
    >>> bool((found.pairs.feature < found.pairs.other).all()), 1 <= found.effective_rank <= 32
    (True, True)

    Args:
        sae: a run directory, or an SAE in memory.
        threshold: the smallest cosine of a reported pair.

    Raises:
        UserError: no such SAE, weights with NaN or infinity, a threshold outside 0 to 1, or more than 5
            million pairs.
    """
    import pandas as pd

    if not 0 < threshold <= 1:
        raise UserError(f"threshold is {threshold}; give a cosine greater than 0 and at most 1")
    unit_MD = _directions(sae)
    feature, other, cosine = _pairs(unit_MD, threshold)
    pairs = pd.DataFrame({"feature": feature.numpy(), "other": other.numpy(), "cosine": cosine.numpy()})
    energy_D = torch.linalg.eigvalsh(unit_MD.double().T @ unit_MD.double()).clamp_min(0)
    share_D = energy_D.sqrt() / energy_D.sqrt().sum()
    return Redundancy(
        pairs=pairs.sort_values("cosine", ascending=False, kind="stable", ignore_index=True),
        threshold=threshold,
        share=len(torch.unique(torch.cat([feature, other]))) / len(unit_MD),
        effective_rank=math.exp(torch.special.entr(share_D).sum().item()),
        participation_ratio=(energy_D.sum().square() / energy_D.square().sum()).item(),
    )


def _directions(sae: SAE | str | PathLike[str]) -> Tensor:
    """[M, D] float32 on the CPU, rows of unit norm."""
    loaded, _ = read_sae(sae, "sae")
    W_MD = decoder_rows(sae, loaded).detach().float().cpu()
    if not W_MD.isfinite().all():
        raise UserError("the decoder of the SAE holds NaN or infinity; train it again or restore a copy")
    return torch.nn.functional.normalize(W_MD)


def _clustered(unit_MD: Tensor, n: int, seed: int) -> pd.DataFrame:
    import pandas as pd

    if not 1 <= n <= len(unit_MD):
        raise UserError(f"the number of clusters is {n}; give 1 to {len(unit_MD)}, the number of latents")
    center_CD = _kmeanspp_init(unit_MD, n, seed)
    cluster_M = torch.full((len(unit_MD),), -1)
    for _ in range(MOST_ROUNDS):
        cosine_M, nearest_M = _nearest(unit_MD, center_CD)
        nearest_M = _without_empty(nearest_M, cosine_M, n)
        if torch.equal(nearest_M, cluster_M):
            break
        cluster_M = nearest_M
        sums_CD = torch.zeros(n, unit_MD.shape[1], dtype=torch.float64)
        center_CD = torch.nn.functional.normalize(sums_CD.index_add_(0, cluster_M, unit_MD.double())).float()
    size_C = torch.bincount(cluster_M, minlength=n)
    place_C = torch.empty(n, dtype=torch.int64)
    place_C[size_C.sort(descending=True, stable=True).indices] = torch.arange(n)
    cosine_M = (unit_MD * center_CD[cluster_M]).sum(1).clamp_(-1, 1)
    return pd.DataFrame(
        {
            "feature": range(len(unit_MD)),
            "cluster": place_C[cluster_M].numpy(),
            "cosine": cosine_M.numpy(),
        }
    )


def _kmeanspp_init(unit_MD: Tensor, n: int, seed: int) -> Tensor:
    """[C, D] initial centers (greedy k-means++): each is the best of a few rows, drawn with probabilities
    proportional to 1 - cosine to the nearest center so far."""
    generator = torch.Generator().manual_seed(seed)
    tried = 2 + int(math.log(n))
    chosen = [int(torch.randint(len(unit_MD), (1,), generator=generator))]
    apart_M = (1 - unit_MD @ unit_MD[chosen[0]]).clamp_min(0)
    for _ in range(n - 1):
        apart_M[chosen] = 0.0
        total_M = apart_M.double().cumsum(0)
        if total_M[-1] > 0:
            drawn = torch.rand(tried, generator=generator, dtype=torch.float64) * total_M[-1]
            drawn_L = torch.searchsorted(total_M, drawn, right=True).clamp_max(len(unit_MD) - 1)
        else:  # all other rows equal a chosen one
            drawn_L = torch.tensor([next(i for i in range(len(unit_MD)) if i not in set(chosen))])
        left_LM = torch.minimum(apart_M, (1 - unit_MD[drawn_L] @ unit_MD.T).clamp_min(0))
        best = int(left_LM.double().sum(1).argmin())
        chosen.append(int(drawn_L[best]))
        apart_M = left_LM[best]
    return unit_MD[chosen]


def _without_empty(cluster_M: Tensor, cosine_M: Tensor, n: int) -> Tensor:
    """Give each empty cluster the latent with the smallest cosine to its center in a cluster of several."""
    for empty in (torch.bincount(cluster_M, minlength=n) == 0).nonzero()[:, 0].tolist():
        shared_M = torch.bincount(cluster_M, minlength=n)[cluster_M] > 1
        worst = int(torch.where(shared_M, cosine_M, torch.inf).argmin())
        cluster_M, cosine_M = cluster_M.clone(), cosine_M.clone()
        cluster_M[worst], cosine_M[worst] = empty, torch.inf
    return cluster_M


def _nearest(unit_MD: Tensor, center_CD: Tensor) -> tuple[Tensor, Tensor]:
    """The largest cosine [M] of each row with a center, and the index [M] of that center; in blocks."""
    block = max(1, BLOCK_BYTES // (4 * len(center_CD)))
    found = [(part_BD @ center_CD.T).max(dim=1) for part_BD in torch.split(unit_MD, block)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def _pairs(unit_MD: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(i, j, cosine)`` [P], i < j, of all pairs with a cosine of at least ``threshold``; in blocks."""
    block = max(1, BLOCK_BYTES // (4 * len(unit_MD)))
    found, n_found = [(torch.empty(0, dtype=torch.int64),) * 2 + (torch.empty(0),)], 0
    for start in range(0, len(unit_MD), block):
        cosine_BM = (unit_MD[start : start + block] @ unit_MD[start:].T).clamp_(-1, 1)
        row, column = (cosine_BM >= threshold).triu_(1).nonzero(as_tuple=True)
        found.append((row + start, column + start, cosine_BM[row, column]))
        n_found += len(row)
        if n_found > MOST_PAIRS:
            raise UserError(
                f"more than {MOST_PAIRS:,} pairs have a cosine of at least {threshold}; raise threshold"
            )
    first, second, cosine = (torch.cat(parts) for parts in zip(*found, strict=True))
    return first, second, cosine
