"""``ReadoutWorld``: small features that a classifier reads, among large features that it does not read.

It tests the gradient method (Olmo et al. 2024, arXiv 2411.10397). A downstream classifier reads a subspace
that only small features write to. If a code has fewer latents than there are active features, keeping the
largest activations loses the small features. The gradient of the classifier's loss, which is known in closed
form, identifies them.

Shapes: N rows, F features, D = d_in, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.evaluation.synthetic.truth import World, unit_rows


@dataclass(frozen=True, kw_only=True)
class ReadoutWorld(World):
    """``n_large`` features of strength 1 + 0.25 N(0, 1), and ``n_small`` of ``small`` times that, at least 0.

    All features fire independently: large ones with probability l0_large / n_large, small ones with
    l0_small / n_small. Small features are an orthonormal basis of a random subspace. Large features are
    random directions in its complement; there are more of them than dimensions. The classifier has the
    weights W = sharpness * sum_i f_i a_i^T over the small features f_i, with a_i standard normal in R^C, so
    its gradient is in the subspace of the small features. Labels are drawn from its softmax.
    """

    n_large: int = 192
    n_small: int = 32
    d_in: int = 128
    l0_large: float = 12.0
    l0_small: float = 4.0
    small: float = 0.25
    """Strength of a small feature relative to a large one."""
    n_classes: int = 16
    sharpness: float = 8.0
    """Scale of the logits; a larger scale makes labels less random given the row."""

    @property
    def n_features(self) -> int:
        return self.n_large + self.n_small

    def draw_features(self, generator: torch.Generator) -> Tensor:
        d_large = self.d_in - self.n_small
        features_FD = torch.zeros(self.n_features, self.d_in)
        features_FD[: self.n_large, :d_large] = torch.randn(self.n_large, d_large, generator=generator)
        features_FD[self.n_large :, d_large:] = torch.eye(self.n_small)
        turn_DD = torch.linalg.qr(torch.randn(self.d_in, self.d_in, generator=generator)).Q
        return unit_rows(features_FD @ turn_DD)

    def draw_strengths(self, n_rows: int, generator: torch.Generator) -> Tensor:
        sizes = torch.tensor([self.n_large, self.n_small])
        p_F = torch.tensor([self.l0_large, self.l0_small]).div(sizes).repeat_interleave(sizes)
        scale_F = torch.tensor([1.0, self.small]).repeat_interleave(sizes)
        active_NF = torch.rand(n_rows, self.n_features, generator=generator) < p_F
        values_NF = 1 + 0.25 * torch.randn(n_rows, self.n_features, generator=generator)
        return values_NF.clamp_min(0) * scale_F * active_NF

    def groups(self) -> dict[str, Tensor]:
        """'large' and 'small'."""
        everything = torch.arange(self.n_features)
        return {"large": everything[: self.n_large], "small": everything[self.n_large :]}

    def readout_weights(self) -> Tensor:
        a_FC = torch.randn(self.n_small, self.n_classes, generator=self.generator("readout"))
        return self.sharpness * self.features_FD[self.n_large :].T @ a_FC
