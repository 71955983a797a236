"""Matryoshka SAE: nested dictionaries, each with its own reconstruction loss, on top of mutual choice.

Bussmann et al. 2025, arXiv 2503.17547.

Shapes: G prefixes, N rows, S entries, D = d_in, M = d_sae latents.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saebench.core.codes import SparseCodes
from saebench.core.errors import UserError
from saebench.saes.base import Batch, LossTerms
from saebench.saes.mutual_choice import MutualChoiceSAE, MutualChoiceSpec
from saebench_kernels import sparse_decode


@dataclass(frozen=True, kw_only=True)
class MatryoshkaSpec(MutualChoiceSpec):
    """Settings of a Matryoshka SAE."""

    name: ClassVar[str] = "matryoshka"

    prefixes: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """Sizes of the nested dictionaries as shares of d_sae, ascending to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = [0.0, *self.prefixes]
        ascending = all(a < b for a, b in itertools.pairwise(shares))
        if not self.prefixes or self.prefixes[-1] != 1 or not ascending:
            raise UserError(
                f"prefixes is {', '.join(map(str, self.prefixes)) or 'empty'}; it must be shares of d_sae "
                "that ascend to 1, like 0.25 0.5 1"
            )

    @property
    def sizes(self) -> list[int]:
        """Number of latents of each prefix; in a small dictionary several shares may give the same number."""
        return sorted({max(1, round(share * self.d_sae)) for share in self.prefixes})


class MatryoshkaSAE(MutualChoiceSAE):
    """Mutual choice in which the first latents must reconstruct without the later ones.

    With x_hat_g the reconstruction by the first latents alone, as many as the g-th size,
    loss = mean over g of |x - x_hat_g|^2 / d_in  +  aux_coefficient * AuxK (of the whole dictionary).

    Sizes are fixed and double, as in the public trainers (whose largest groups differ in detail). The paper
    sums over the prefixes; the mean keeps the proportion of loss and AuxK for any number of prefixes. The
    choice, inference and its threshold are those of mutual choice.
    """

    Spec = MatryoshkaSpec
    spec: MatryoshkaSpec

    def graph_key(self, progress: float) -> Hashable | None:
        return None

    def loss(self, batch: Batch) -> LossTerms:
        with torch.no_grad():
            chosen = self.choose(batch)
        codes = self.attach_gradients(batch.x_ND, chosen)
        x_hat_GND = self.decode_prefixes(codes)
        if self.spec.skip:
            x_hat_GND = x_hat_GND + self.skipped(batch.x_ND)
        return self.terms(batch, codes, x_hat_GND[-1], (batch.y_NE - x_hat_GND).square().mean())

    def decode_prefixes(self, codes: SparseCodes) -> Tensor:
        """The reconstruction by each prefix of the dictionary, [G, N, d_out]; the last is the whole one's.

        Each entry is decoded once: the entries of the g-th group of latents give what prefix g adds to the
        prefix before it.
        """
        sizes = torch.tensor(self.spec.sizes, device=codes.indices.device)
        n_rows, n_groups = codes.n_rows, len(sizes)
        group_S = torch.searchsorted(sizes, codes.indices.long(), right=True)
        part_S, order_S = torch.sort(group_S * n_rows + codes.rows(), stable=True)
        bounds = torch.arange(n_groups * n_rows + 1, device=sizes.device)
        parts = SparseCodes.from_ragged(
            codes.values[order_S],
            codes.indices[order_S],
            torch.searchsorted(part_S, bounds),
            d_sae=self.d_sae,
        )
        zeros_D = torch.zeros_like(self.b_dec)
        added = sparse_decode(parts.values, parts.entries, self.W_dec, zeros_D)
        return added.view(n_groups, n_rows, self.d_out).cumsum(0) + self.b_dec
