"""``SuperpositionWorld``: about a thousand correlated, hierarchical features in far fewer dimensions.

It follows SynthSAEBench (arXiv 2602.14687: Zipf frequencies, trees of branching 4 and depth 3 with exclusive
siblings, a Gaussian copula of low rank), at a size that can be trained on two CPU cores. It is based on
published descriptions, not on code of SynthSAEBench. How exclusive siblings are drawn and which features the
copula includes are our choices; the class documents them.

Shapes: N rows, F features, D = d_in, B base features (roots and features without a tree), R = rank.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.evaluation.synthetic.truth import World, unit_rows

SD_STRENGTH = 0.25


@dataclass(frozen=True, kw_only=True)
class SuperpositionWorld(World):
    """``n_trees`` trees of features; the rest of the ``n_features`` features are not in a tree.

    Base features are the roots, followed by the features outside trees. Base feature r fires with the Zipf
    probability ``p_max`` (r + 1)^-``exponent``. Base features are correlated: feature b fires if the normal
    variable u_b = l_b . z + sqrt(1 - |l_b|^2) e_b is below the quantile of its probability. z is standard
    normal in R^rank and shared by the row; the entries of l_b are N(0, ``loading``^2).

    At most one of the ``branching`` children of an active node is active: with probability ``p_child`` one
    is, and it is the c-th with a probability proportional to (c + 1)^-1/2. These choices are independent. So
    a node is active only if its parent is, siblings exclude each other, and the frequency of each feature is
    known exactly. Mean strengths decrease linearly in the rank from ``strongest`` for the most frequent
    feature to 1 for the rarest. Their standard deviation is 0.25, and strengths are at least 0. Directions
    are random unit vectors.
    """

    n_features: int = 1024
    d_in: int = 128
    n_trees: int = 8
    branching: int = 4
    depth: int = 3
    """Levels of a tree below its root."""
    p_max: float = 0.3
    exponent: float = 0.6
    p_child: float = 0.8
    rank: int = 25
    loading: float = 0.1
    strongest: float = 1.25

    def __post_init__(self) -> None:
        if self.n_features < self.n_trees * self.nodes_per_tree:
            raise ValueError(f"{self.n_features} features are fewer than the nodes of {self.n_trees} trees")

    @property
    def nodes_per_tree(self) -> int:
        return sum(self.branching**level for level in range(self.depth + 1))

    @functools.cached_property
    def parents(self) -> Tensor:
        """[F] int64: the parent of every feature, -1 for base features.

        Tree t has the features from t * nodes_per_tree on, level by level, with siblings next to each other.
        """
        place_T = torch.arange(self.nodes_per_tree)
        parent_T = torch.where(place_T > 0, (place_T - 1) // self.branching, -1)
        starts = torch.arange(self.n_trees) * self.nodes_per_tree
        tree_parents = torch.where(parent_T >= 0, parent_T + starts[:, None], -1).flatten()
        free = torch.full((self.n_features - len(tree_parents),), -1)
        return torch.cat([tree_parents, free])

    @functools.cached_property
    def sibling_families(self) -> Tensor:
        """[inner nodes, branching] int64: the children of each inner node, parents before children."""
        children = (self.parents >= 0).nonzero()[:, 0]
        return children.view(-1, self.branching)

    def frequencies(self) -> Tensor:
        """[F] float64: the firing probability of each feature."""
        p_F = torch.zeros(self.n_features, dtype=torch.float64)
        base_B = self._base()
        p_F[base_B] = self.p_max * torch.arange(1, len(base_B) + 1, dtype=torch.float64) ** -self.exponent
        for family in self.sibling_families:
            p_F[family] = p_F[self.parents[family]] * self._shares()
        return p_F

    def mean_strengths(self) -> Tensor:
        """[F] float32: the mean strength of each feature."""
        rank_F = self.frequencies().argsort(descending=True, stable=True).argsort()
        means_F: Tensor = self.strongest + (1 - self.strongest) * rank_F.float() / (self.n_features - 1)
        return means_F

    def loadings(self) -> Tensor:
        """[B, R] float32: loadings l_b of the base features on the row's shared variables."""
        generator = self.generator("loadings")
        loadings_BR = self.loading * torch.randn(len(self._base()), self.rank, generator=generator)
        bounded_BR: Tensor = loadings_BR / loadings_BR.norm(dim=1, keepdim=True).clamp_min(1)
        return bounded_BR

    def draw_features(self, generator: torch.Generator) -> Tensor:
        return unit_rows(torch.randn(self.n_features, self.d_in, generator=generator))

    def draw_strengths(self, n_rows: int, generator: torch.Generator) -> Tensor:
        active_NF = torch.zeros(n_rows, self.n_features, dtype=torch.bool)
        base_B = self._base()
        loadings_BR = self.loadings()
        own_B = (1 - loadings_BR.square().sum(1)).clamp_min(0).sqrt()
        common_NR = torch.randn(n_rows, self.rank, generator=generator)
        u_NB = common_NR @ loadings_BR.T + own_B * torch.randn(n_rows, len(base_B), generator=generator)
        active_NF[:, base_B] = u_NB < torch.special.ndtri(self.frequencies()[base_B]).float()

        edges = self._shares().cumsum(0).float()
        chance_NG = torch.rand(n_rows, len(self.sibling_families), generator=generator)
        chosen_NG = torch.bucketize(chance_NG, edges, right=True)
        for family, chosen_N in zip(self.sibling_families, chosen_NG.T, strict=True):
            parent_N = active_NF[:, self.parents[family[0]]]
            active_NF[:, family] = parent_N[:, None] & (chosen_N[:, None] == torch.arange(self.branching))

        row_S, feature_S = active_NF.nonzero(as_tuple=True)
        noise_S = SD_STRENGTH * torch.randn(len(row_S), generator=generator)
        strengths_NF = torch.zeros(n_rows, self.n_features)
        strengths_NF[row_S, feature_S] = (self.mean_strengths()[feature_S] + noise_S).clamp_min(0)
        return strengths_NF

    def groups(self) -> dict[str, Tensor]:
        """'base': roots and features outside trees; 'level 1' to 'level depth': other nodes of the trees."""
        level_F = torch.zeros(self.n_features, dtype=torch.int64)
        for family in self.sibling_families:
            level_F[family] = level_F[self.parents[family[0]]] + 1
        levels = {f"level {n}": (level_F == n).nonzero()[:, 0] for n in range(1, self.depth + 1)}
        return {"base": self._base(), **levels}

    def _base(self) -> Tensor:
        return (self.parents < 0).nonzero()[:, 0]

    def _shares(self) -> Tensor:
        """[branching] float64: the probability of each child, given its parent."""
        weights = torch.arange(1, self.branching + 1, dtype=torch.float64) ** -0.5
        return self.p_child * weights / weights.sum()
