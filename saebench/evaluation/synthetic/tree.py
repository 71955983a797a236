"""``TreeWorld``: features of a tree, orthogonal across levels and correlated within a level.

The tree, the activations and the mixing are those of the toy model of Costa et al. 2025 (MP-SAE, arXiv
2506.03093), according to the authors' code. The root is not a feature. It has eleven children, exactly one of
which is active in each row: three parents with probability 0.2 each and eight leaves with 0.05 each. At most
one of the three children of the active parent is active: each with probability 0.2, none with 0.4. The mean
number of active features is 0.6 + 0.4 + 0.6 * 0.6 = 1.36.

Shapes: N rows, F = 20 features, D = 20 dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.evaluation.synthetic.truth import World, unit_rows

N_FEATURES = 20
TRUE_L0 = 1.36
N_ROOT_CHILDREN = 11
CHILDREN = ((11, 12, 13), (14, 15, 16), (17, 18, 19))
"""The children of parents 0, 1 and 2; features 3 to 10 are the leaves."""
P_ROOT_CHILDREN = (0.2,) * 3 + (0.05,) * 8
P_CHILD = 0.2
MEAN_STRENGTH, SD_STRENGTH = 1.5, 0.25
EPS_CHILD = (0.0, 0.0895, 0.163, 0.226, 0.282, 0.3335, 0.3825, 0.431, 0.482)
EPS_PARENT = (0.0, 0.3, 0.44, 0.529, 0.594, 0.6467, 0.692, 0.733, 0.7739)
N_LEVELS = len(EPS_CHILD)


@dataclass(frozen=True, kw_only=True)
class TreeWorld(World):
    """Features of a tree whose siblings have a cosine of ``level`` / 10.

    The directions start as a random orthonormal basis q. Within a group of n siblings (the root's eleven
    children; each triple of children) every direction becomes
    (1 - eps) q_i + eps / (n - 1) * sum of the other q_j of the group, and is normalized. Directions of
    different groups, such as those of a parent and its child, stay orthogonal. The strength of an active
    feature is 1.5 + 0.25 N(0, 1), drawn independently; a negative strength counts as absent.
    """

    level: int = 0
    """0 to 8; the cosine between siblings is ``level`` / 10."""

    def __post_init__(self) -> None:
        if not 0 <= self.level < N_LEVELS:
            raise ValueError(f"level is {self.level}; it must be between 0 and {N_LEVELS - 1}")

    def draw_features(self, generator: torch.Generator) -> Tensor:
        noise = torch.randn(N_FEATURES, N_FEATURES, generator=generator, dtype=torch.float64)
        basis_FD = torch.linalg.qr(noise).Q.T.contiguous()
        mixed_FD = basis_FD.clone()
        for group, indices in self.groups().items():
            eps = (EPS_PARENT if group == "root" else EPS_CHILD)[self.level]
            own_GD = basis_FD[indices]
            others_GD = own_GD.sum(0) - own_GD
            mixed_FD[indices] = (1 - eps) * own_GD + eps / (len(indices) - 1) * others_GD
        return unit_rows(mixed_FD).float()

    def draw_strengths(self, n_rows: int, generator: torch.Generator) -> Tensor:
        top_N = torch.multinomial(torch.tensor(P_ROOT_CHILDREN), n_rows, True, generator=generator)
        p_child = torch.tensor((P_CHILD,) * 3 + (1 - 3 * P_CHILD,))
        place_N = torch.multinomial(p_child, n_rows, True, generator=generator)
        active_NF = torch.zeros(n_rows, N_FEATURES, dtype=torch.bool)
        active_NF[torch.arange(n_rows), top_N] = True
        row = ((top_N < len(CHILDREN)) & (place_N < 3)).nonzero()[:, 0]
        active_NF[row, torch.tensor(CHILDREN)[top_N[row], place_N[row]]] = True
        strengths_NF = MEAN_STRENGTH + SD_STRENGTH * torch.randn(n_rows, N_FEATURES, generator=generator)
        return strengths_NF.clamp_min(0) * active_NF

    def groups(self) -> dict[str, Tensor]:
        """'root' (the root's children) and 'children of 0' to 'children of 2'."""
        triples = {f"children of {parent}": torch.tensor(c) for parent, c in enumerate(CHILDREN)}
        return {"root": torch.arange(N_ROOT_CHILDREN), **triples}
