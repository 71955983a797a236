"""Entries of sparse codes: which latents are active in which rows. And the result of a matching pursuit.

Shapes: N rows, S entries of all rows end to end, K picks per row, D = d_in, M = d_sae latents.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from saebench_kernels.latent_sums import LatentGroups, group_by_latent


@dataclass(frozen=True, eq=False)
class Entries:
    """Entries of N rows, flat and row by row. Exactly one of ``k`` and ``offsets`` is given.

    On a GPU, ragged entries may be followed by padding that belongs to no row.
    """

    indices: Tensor
    """[S] int32: the latent of each entry."""
    d_sae: int
    n_rows: int
    k: int | None = None
    """Entries per row, where every row has the same number."""
    offsets: Tensor | None = None
    """[N + 1] int64: where each row begins."""
    _sorted: list[LatentGroups] = field(default_factory=list, repr=False)
    """At most one item: the groups, once they were asked for."""

    @property
    def row_offsets(self) -> Tensor:
        """[N + 1] int64: where each row begins, on the device of the entries."""
        if self.offsets is not None:
            return self.offsets
        assert self.k is not None
        return torch.arange(self.n_rows + 1, device=self.indices.device, dtype=torch.int64) * self.k

    def rows(self) -> Tensor:
        """[S] int64: the row of every entry; padding is assigned to the last row."""
        if self.k is not None:
            return torch.arange(self.n_rows, device=self.indices.device).repeat_interleave(self.k)
        n_entries = self.indices.numel()
        if self.indices.is_cuda:  # without waiting for the device
            places_S = torch.arange(n_entries, device=self.indices.device)
            rows_S = torch.searchsorted(self.row_offsets[1:], places_S, right=True)
            return rows_S.clamp_max(max(0, self.n_rows - 1))
        return torch.repeat_interleave(self.row_offsets.diff(), output_size=n_entries)

    @property
    def groups(self) -> LatentGroups:
        """The entries sorted by latent, for weight gradients; sorted once."""
        if not self._sorted:
            self._sorted.append(group_by_latent(self.indices, self.rows(), self.d_sae))
        return self._sorted[0]


class Pursuit(NamedTuple):
    """The result of a pursuit."""

    values_NK: Tensor
    """float32, in the order of the picks; 0 where the row had ended."""
    indices_NK: Tensor
    """int32 or int64; 0 where the row had ended."""
    residual_ND: Tensor
    """float32: what the picks leave of each row."""
