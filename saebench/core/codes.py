"""SparseCodes: the sparse output of every encoder.

Shapes: N rows (tokens), K slots per row when rectangular, S stored entries, M = d_sae latents.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saebench.core.deprecation import warn_renamed
from saebench_kernels import Entries, LatentGroups


@dataclass(frozen=True, eq=False, repr=False)
class SparseCodes:
    """Codes of N rows over ``d_sae`` latents, flat and ragged.

    ``indices`` [S] int32 and ``values`` [S] float hold the entries of row 0, then those of row 1, and so on.
    With ``k`` set, every row has exactly k slots, and the offsets are computed without a tensor; otherwise
    ``offsets`` [N + 1] int64 gives the start of each row. A value of zero is padding: it counts neither in
    ``l0`` nor in gradients, and its index has no meaning. Ragged codes made on a GPU may have more slots than
    entries; the extra slots are padding after the last row. The order within a row is unspecified unless the
    SAE documents one. ``leading_shape`` is the shape of the input without its last axis: () for one vector,
    (N,) or (B, T).
    """

    indices: Tensor
    values: Tensor
    d_sae: int
    leading_shape: tuple[int, ...]
    k: int | None = None
    offsets: Tensor | None = None
    row_norm: tuple[Tensor, Tensor] | None = None
    """Mean and scale [n_rows, 1] of each encoded row, for an SAE that normalizes rows; see input_norm.py."""
    _sorted: list[LatentGroups] = field(default_factory=list)
    """At most one item: the groups, after the first use of `groups`."""

    def __post_init__(self) -> None:
        assert (self.k is None) != (self.offsets is None), "exactly one of k and offsets"
        assert self.indices.dtype == torch.int32, self.indices.dtype
        assert self.indices.shape == self.values.shape and self.values.ndim == 1
        if self.k is not None:
            assert self.values.numel() == self.n_rows * self.k, (self.values.shape, self.leading_shape)

    def __repr__(self) -> str:
        slots = "ragged" if self.k is None else f"k={self.k}"
        shape, device = list(self.leading_shape), self.values.device
        return f"SparseCodes({shape} of {self.d_sae} latents, {slots}, {device})"

    @classmethod
    def from_topk(
        cls, values: Tensor, indices: Tensor, *, d_sae: int, leading_shape: tuple[int, ...] | None = None
    ) -> SparseCodes:
        """From ``values`` and ``indices`` of shape [N, K]."""
        n_rows, k = values.shape
        shape = (n_rows,) if leading_shape is None else leading_shape
        return cls(indices.to(torch.int32).reshape(-1), values.reshape(-1), d_sae, shape, k=k)

    @classmethod
    def from_ragged(
        cls,
        values: Tensor,
        indices: Tensor,
        offsets: Tensor,
        *,
        d_sae: int,
        leading_shape: tuple[int, ...] | None = None,
    ) -> SparseCodes:
        """From flat ``values`` and ``indices`` [S] and int64 ``offsets`` [N + 1]."""
        shape = (offsets.numel() - 1,) if leading_shape is None else leading_shape
        return cls(indices.to(torch.int32), values, d_sae, shape, offsets=offsets.to(torch.int64))

    @property
    def n_rows(self) -> int:
        n = 1
        for size in self.leading_shape:
            n *= size
        return n

    @property
    def entries(self) -> Entries:
        """The entries without their values, as the ops of ``saebench_kernels`` take them."""
        return Entries(self.indices, self.d_sae, self.n_rows, self.k, self.offsets, self._sorted)

    @property
    def groups(self) -> LatentGroups:
        """Deprecated name of ``entries.groups``."""
        warn_renamed("SparseCodes.groups", "SparseCodes.entries.groups")
        return self.entries.groups

    @property
    def row_offsets(self) -> Tensor:
        """[N + 1] int64, on the device of the codes."""
        return self.entries.row_offsets

    def rectangular(self) -> tuple[Tensor, Tensor]:
        """``(indices, values)``, each a view [N, K]; only when ``k`` is set."""
        assert self.k is not None, "ragged codes have no rectangular view"
        return self.indices.view(-1, self.k), self.values.view(-1, self.k)

    def rows(self) -> Tensor:
        """[S] int64: the row of every stored entry, padding included."""
        return self.entries.rows()

    def with_values(self, values: Tensor) -> SparseCodes:
        """The same entries with other ``values`` [S]; the two share their groups."""
        return dataclasses.replace(self, values=values)

    def coo(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(row int64, index int32, value)`` of the entries that are not padding, in stored order."""
        real = self.values != 0
        return self.rows()[real], self.indices[real], self.values[real]

    def merged(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(row, index, value)`` like `coo`, sorted by row and index, with repeated latents summed.

        These are exactly the nonzero entries of ``to_dense()``, computed without forming it.
        """
        row, index, value = self.coo()
        key, entry = torch.unique(row * self.d_sae + index.long(), return_inverse=True)
        summed = value.new_zeros(len(key)).index_add_(0, entry, value)
        key, summed = key[summed != 0], summed[summed != 0]
        return key.div(self.d_sae, rounding_mode="floor"), key % self.d_sae, summed

    def firings(self) -> Tensor:
        """[d_sae] int32: the number of entries in which each latent is active."""
        times_M = torch.zeros(self.d_sae, dtype=torch.int32, device=self.indices.device)
        return times_M.index_add_(0, self.indices, (self.values != 0).to(torch.int32))

    def l0(self) -> Tensor:
        """[*leading_shape] int64: the number of distinct active latents; repeated picks count once."""
        row, index, _ = self.coo()
        distinct = torch.unique(row * self.d_sae + index.long())
        rows = distinct.div(self.d_sae, rounding_mode="floor")
        return torch.bincount(rows, minlength=self.n_rows).view(self.leading_shape)

    def to_dense(self) -> Tensor:
        """[*leading_shape, d_sae]; repeated latents are summed."""
        dense = self.values.new_zeros(self.n_rows * self.d_sae)
        row, index, value = self.coo()
        dense.index_add_(0, row * self.d_sae + index.long(), value)
        return dense.view(*self.leading_shape, self.d_sae)

    def to(self, device: torch.device | str) -> SparseCodes:
        offsets = None if self.offsets is None else self.offsets.to(device)
        norm = None if self.row_norm is None else (self.row_norm[0].to(device), self.row_norm[1].to(device))
        indices, values = self.indices.to(device), self.values.to(device)
        return SparseCodes(indices, values, self.d_sae, self.leading_shape, self.k, offsets, norm)
