"""``ZipfWorld``: features with Zipf frequencies, in tokens with a variable or constant number of features.

It tests the claims about mutual choice and feature choice (Ayonrinde 2024, arXiv 2411.02124): a fixed number
of latents per token reconstructs worse if the number of features varies between tokens, and not otherwise.

Shapes: N rows, F features, D = d_in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saebench.evaluation.synthetic.truth import World, unit_rows

MEAN_STRENGTH, SD_STRENGTH, LEAST_STRENGTH = 1.0, 0.25, 0.1


@dataclass(frozen=True, kw_only=True)
class ZipfWorld(World):
    """Random unit directions; feature r of F has the frequency ``p_r``, proportional to (r + 1)^-exponent.

    A token draws its number of features n from the distribution ``difficulty``. Each feature r draws an
    exponential waiting time with rate -log(1 - p_r), and the token has the n features with the shortest
    times. A time is below 1 with probability exactly p_r, and on average ``true_l0`` times are. So the n
    features are distinct, and at average n each feature has about its Zipf frequency; tokens with more
    features have more rare ones. Strengths are 1 + 0.25 N(0, 1), at least 0.1, so that no feature of a token
    has strength 0.
    """

    difficulty: Literal["lognormal", "poisson", "constant"] = "lognormal"
    """Distribution of the number of active features per token: 1 + lognormal (the logarithm has standard
    deviation ``spread``; randomly rounded without changing the mean), 1 + Poisson, or constant. The mean is
    always ``true_l0``."""
    n_features: int = 256
    d_in: int = 128
    true_l0: int = 8
    """Mean number of active features."""
    exponent: float = 1.0
    """Exponent of the Zipf distribution."""
    spread: float = 0.75
    """Standard deviation of the logarithm of the lognormal distribution."""

    def frequencies(self) -> Tensor:
        """[F] float64 p_r, descending, with the sum ``true_l0``; at most 1/2 each.

        Frequencies above 1/2 are set to 1/2, and the other ones are scaled so that the sum is ``true_l0``.
        """
        law_F = torch.arange(1, self.n_features + 1, dtype=torch.float64) ** -self.exponent
        p_F = torch.full_like(law_F, 0.5)
        for n_capped in range(self.n_features):
            rest_F = law_F[n_capped:]
            p_F[n_capped:] = rest_F * (self.true_l0 - 0.5 * n_capped) / rest_F.sum()
            if p_F[n_capped] <= 0.5:
                return p_F
            p_F[n_capped] = 0.5
        raise ValueError(f"{self.n_features} features cannot have a mean of {self.true_l0} active per token")

    def draw_features(self, generator: torch.Generator) -> Tensor:
        return unit_rows(torch.randn(self.n_features, self.d_in, generator=generator))

    def draw_strengths(self, n_rows: int, generator: torch.Generator) -> Tensor:
        number_N = self._numbers(n_rows, generator).clamp_max(self.n_features)
        clocks_NF = torch.empty(n_rows, self.n_features).exponential_(generator=generator)
        clocks_NF /= -torch.log1p(-self.frequencies()).float()
        most = int(number_N.max())
        first_NK = clocks_NF.topk(most, dim=1, largest=False).indices
        rings_NK = torch.arange(most) < number_N[:, None]
        values_NK = MEAN_STRENGTH + SD_STRENGTH * torch.randn(n_rows, most, generator=generator)
        return torch.zeros_like(clocks_NF).scatter(
            1, first_NK, values_NK.clamp_min(LEAST_STRENGTH) * rings_NK
        )

    def _numbers(self, n_rows: int, generator: torch.Generator) -> Tensor:
        """[N] int64: the number of features of each token."""
        if self.difficulty == "constant":
            return torch.full((n_rows,), self.true_l0)
        mean = self.true_l0 - 1.0
        if self.difficulty == "poisson":
            return 1 + torch.poisson(torch.full((n_rows,), mean), generator=generator).long()
        log_N = math.log(mean) - self.spread**2 / 2 + self.spread * torch.randn(n_rows, generator=generator)
        return 1 + (log_N.exp() + torch.rand(n_rows, generator=generator)).long()
