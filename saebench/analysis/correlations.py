"""Correlations: the Pearson correlation of each latent of one SAE with each latent of another.

Shapes: N rows, A and B latents of the two SAEs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from saebench.core.codes import SparseCodes

BLOCK_BYTES = 2**27
CONSTANT = 1e-12
"""A variance below this fraction of the mean square is a rounding error: the latent is constant."""


class Correlations:
    """Accumulates sums over rows of z_i, z_i^2 and z_i z_j in float64, and computes correlations from them.

    (mean z_i z_j - mean z_i mean z_j) / (std z_i std z_j),  and 0 where a latent is constant.
    """

    def __init__(self, n_a: int, n_b: int) -> None:
        self.product_AB = torch.zeros(n_a, n_b, dtype=torch.float64)
        self.moments = [torch.zeros(2, n, dtype=torch.float64) for n in (n_a, n_b)]
        self.n_rows = 0

    def add(self, codes_a: SparseCodes, codes_b: SparseCodes) -> None:
        """Add the codes of the same N rows. Only products of nonzero entries are computed, in blocks of the
        latents of ``codes_a``."""
        a_NA, b_NB = _sparse(codes_a), _sparse(codes_b)
        for moments, codes in zip(self.moments, (a_NA, b_NB), strict=True):
            moments[0] += torch.from_numpy(codes.sum(axis=0))
            moments[1] += torch.from_numpy(codes.multiply(codes).sum(axis=0))
        a_AN = a_NA.T.tocsr()
        n_a, n_b = self.product_AB.shape
        block = max(1, BLOCK_BYTES // (24 * n_b))  # an entry of a sparse product, and of the dense one
        for start in range(0, n_a, block):
            part = (a_AN[start : start + block] @ b_NB).toarray()
            self.product_AB[start : start + block] += torch.from_numpy(part)
        self.n_rows += codes_a.n_rows

    def result(self) -> Tensor:
        """The correlations [A, B] float32. Overwrites the sums: call it once, after the last `add`."""
        (mean_A, scale_A), (mean_B, scale_B) = (self._standard(moments) for moments in self.moments)
        found_AB = self.product_AB.div_(self.n_rows).addr_(mean_A, mean_B, alpha=-1)
        return found_AB.mul_(scale_A[:, None]).mul_(scale_B).clamp_(-1, 1).float()

    def _standard(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Means, and 1 / standard deviation, or 0 for a constant latent."""
        mean, square = moments / self.n_rows
        variance = square - mean.square()
        return mean, torch.where(variance > CONSTANT * square, variance.rsqrt(), 0.0)


def _sparse(codes: SparseCodes) -> Any:
    """[N, M] float64 as a scipy sparse array; repeated latents are summed."""
    from scipy.sparse import csr_array

    row, index, value = (part.cpu().numpy() for part in codes.merged())
    return csr_array((value.astype("float64"), (row, index)), shape=(codes.n_rows, codes.d_sae))
