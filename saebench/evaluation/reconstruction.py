"""Reconstruction metrics: explained variance, sparsity, dead latents and activation densities.

Shapes: N rows (tokens), D = d_in, M = d_sae latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saebench.activations.diagnosis import MASSIVE
from saebench.core.errors import UserError

if TYPE_CHECKING:
    from saebench.core.codes import SparseCodes
    from saebench.saes.base import SAE

BINS_PER_DECADE = 4
MEDIAN_ROWS = 1024
"""Rows whose median norm decides which rows are massive."""


@dataclass(frozen=True)
class DensityHistogram:
    """Histogram of the latents over log10 of their activation density.

    Bin i holds ``counts[i]`` latents with ``edges[i] <= log10(density) < edges[i + 1]`` (the last bin
    includes a density of 1). Edges are multiples of 1/4 from the lowest density that is measurable on
    ``n_tokens`` rows, up to 0. The ``dead`` latents, which never fired, are in no bin.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    dead: int


@dataclass(frozen=True)
class ReconstructionMetrics:
    """Measured over ``n_tokens`` rows x_i with codes z_i and reconstructions xh_i; mu is the mean of x_i.

    For a transcoder, x_i is the target that it reconstructs.

    - ``fvu`` = sum_i ||x_i - xh_i||^2 / (sum_i ||x_i||^2 - N ||mu||^2), the fraction of variance
      unexplained: centered and pooled over all rows and dimensions.
    - ``explained_variance`` = 1 - fvu. It equals SAELens' ExplainedVarianceCalculator (6.54).
    - ``l0`` = mean_i of the number of different latents with a nonzero code.
    - ``dead_fraction`` = share of latents that are zero on all of these rows.
    - ``cosine_similarity`` = mean_i of x_i . xh_i / (||x_i|| ||xh_i||), taken as 0 where either is zero.
    - ``density`` [M] float64 = share of rows on which each latent is nonzero; it sums to l0.
    - ``fvu_by_site``: the same fraction as ``fvu`` at each site alone, if several are reconstructed.
    - ``massive_rows``: the number of rows whose norm is above 10 times the median norm of the first 1,024
      rows. Where there are any, ``fvu_ordinary`` is the same fraction as ``fvu`` over the other rows alone
      (with their own mean): a few massive rows can make up nearly all of the variance.
    """

    n_tokens: int
    fvu: float
    explained_variance: float
    l0: float
    dead_fraction: float
    cosine_similarity: float
    density: Tensor
    fvu_by_site: dict[str, float] | None = None
    massive_rows: int = 0
    fvu_ordinary: float | None = None

    def density_histogram(self) -> DensityHistogram:
        lowest = -math.ceil(math.log10(self.n_tokens))
        n_bins = -lowest * BINS_PER_DECADE
        alive = self.density[self.density > 0]
        # Clamped, because rounding in log10 could put a density of exactly 1/N below the first edge.
        bins = ((alive.log10() - lowest) * BINS_PER_DECADE).floor().long().clamp(0, n_bins - 1)
        return DensityHistogram(
            edges=tuple(lowest + i / BINS_PER_DECADE for i in range(n_bins + 1)),
            counts=tuple(torch.bincount(bins, minlength=n_bins).tolist()),
            dead=self.density.numel() - alive.numel(),
        )


class ReconstructionMeter:
    """Accumulates metrics over batches in float64; the result does not depend on the batch sizes."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self.n_tokens = 0
        device = sae.W_dec.device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self._error, self._squares, self._cosine = zero.clone(), zero.clone(), zero.clone()
        self._sum_D = torch.zeros(sae.d_out, dtype=torch.float64, device=device)
        self._of_sites = torch.zeros(2, len(sae.spec.targets), dtype=torch.float64, device=device)
        """Squared error and squared deviation at each target."""
        self._fires_M = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        self._origin_D: Tensor | None = None
        self._ordinary = _OrdinaryRows(sae.d_out, device)

    @torch.no_grad()
    def update(
        self, x_ND: Tensor, codes: SparseCodes | None = None, *, target_NE: Tensor | None = None
    ) -> Tensor:
        """Encode, decode and count the rows ``x_ND`` [N, d_in]; returns y_hat [N, d_out] float32.

        ``codes`` are the codes of the rows, if they differ from ``encode(x_ND)`` (another inference mode);
        ``target_NE`` is what a transcoder is to reconstruct, by default ``x_ND``.

        Raises:
            UserError: an activation or a reconstruction is NaN or infinite.
        """
        x_ND = x_ND.to(self._sum_D.device, torch.float32)
        if x_ND.shape[0] == 0:
            return x_ND.new_empty(0, self.sae.d_out)
        self._require_finite(x_ND, "activation", "harvest them again, in bf16 or fp32")
        codes = self.sae.encode(x_ND) if codes is None else codes
        x_hat_ND = self.sae.decode(codes, x_ND)
        if target_NE is not None:
            target_NE = target_NE.to(self._sum_D.device, torch.float32)
            self._require_finite(target_NE, "target", "harvest them again, in bf16 or fp32")
        self._require_finite(x_hat_ND, "reconstruction", "the SAE's weights are damaged; train it again")

        x, x_hat = (x_ND if target_NE is None else target_NE).double(), x_hat_ND.double()
        if self._origin_D is None:
            self._origin_D = x[0].clone()
        # Sums are taken relative to the first row. The variance stays the same, without the cancellation
        # that occurs if the mean is much larger than the standard deviation.
        shifted = x - self._origin_D
        error_N = (x - x_hat).square().sum(1)
        self._squares += shifted.square().sum()
        self._sum_D += shifted.sum(0)
        self._error += (x - x_hat).square().sum()
        self._ordinary.add(x.norm(dim=1), shifted, error_N)
        norms = x.norm(dim=-1) * x_hat.norm(dim=-1)
        self._cosine += torch.where(norms > 0, (x * x_hat).sum(-1) / norms, 0.0).sum()
        if self.sae.spec.targets:
            for row, rows in enumerate(((x - x_hat).square(), shifted.square())):
                parts = self.sae.split(rows, of=self.sae.spec.targets).values()
                self._of_sites[row] += torch.stack([part.sum() for part in parts])
        self._fires_M += fires(codes)
        self.n_tokens += x_ND.shape[0]
        return x_hat_ND

    def mean(self) -> Tensor:
        """[d_in] float32: the mean of the rows so far."""
        assert self._origin_D is not None, "no rows"
        return (self._origin_D + self._sum_D / self.n_tokens).float()

    def result(self) -> ReconstructionMetrics:
        """The metrics of all rows so far.

        Raises:
            UserError: all rows are equal, so there is no variance to explain.
        """
        n = self.n_tokens
        variance = (self._squares - self._sum_D.square().sum() / max(n, 1)).item()
        if variance <= 0:
            raise UserError(
                f"the {n} measured rows are all equal, so there is no variance to explain; "
                "evaluate on more tokens or check the cache"
            )
        fvu, fvu_ordinary = self._error.item() / variance, self._ordinary.fvu()
        density_M = self._fires_M.double().cpu() / n
        return ReconstructionMetrics(
            n_tokens=n,
            fvu=fvu,
            explained_variance=1 - fvu,
            l0=density_M.sum().item(),
            dead_fraction=(density_M == 0).double().mean().item(),
            cosine_similarity=self._cosine.item() / n,
            density=density_M,
            fvu_by_site=self._fvu_by_site(),
            massive_rows=self._ordinary.n_massive,
            fvu_ordinary=fvu_ordinary,
        )

    def _fvu_by_site(self) -> dict[str, float] | None:
        targets = self.sae.spec.targets
        if len(targets) < 2:
            return None
        error, squares = self._of_sites
        sums = self.sae.split(self._sum_D.square(), of=targets).values()
        variance = squares - torch.stack([part.sum() for part in sums]) / self.n_tokens
        shares = (error / variance).tolist()
        return {site.name: share for site, share in zip(targets, shares, strict=True)}

    def _require_finite(self, rows_ND: Tensor, what: str, way_out: str) -> None:
        finite_N = rows_ND.isfinite().all(-1)
        if not finite_N.all():
            row = self.n_tokens + int((~finite_N).nonzero()[0])
            raise UserError(f"the {what} of evaluated row {row} is NaN or infinite; {way_out}")


class _OrdinaryRows:
    """Sums over the rows that are not massive; see `ReconstructionMetrics`."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.n_massive, self._n = 0, 0
        self._sum_D = torch.zeros(width, dtype=torch.float64, device=device)
        self._squares, self._error = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
        self._limit: Tensor | None = None
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        """The first rows, until there are enough of them for a median that no batch size changes."""

    def add(self, norm_N: Tensor, shifted_ND: Tensor, error_N: Tensor) -> None:
        """Rows, by their norm, their difference from the meter's origin, and their squared error."""
        self._waiting.append((norm_N, shifted_ND, error_N))
        if self._limit is not None or sum(len(rows[0]) for rows in self._waiting) >= MEDIAN_ROWS:
            self._count()

    def fvu(self) -> float | None:
        """None where all rows, or none but equal ones, are ordinary."""
        self._count()
        variance = (self._squares - self._sum_D.square().sum() / max(self._n, 1)).item()
        return self._error.item() / variance if self.n_massive and variance > 0 else None

    def _count(self) -> None:
        if self._limit is None and self._waiting:
            first_N = torch.cat([rows[0] for rows in self._waiting])[:MEDIAN_ROWS]
            self._limit = MASSIVE * first_N.median()
        for norm_N, shifted_ND, error_N in self._waiting:
            assert self._limit is not None
            ordinary_N = norm_N <= self._limit
            n_ordinary = int(ordinary_N.sum())
            self._n += n_ordinary
            self.n_massive += len(norm_N) - n_ordinary
            weight_N = ordinary_N.double()
            self._sum_D += weight_N @ shifted_ND
            self._squares += weight_N @ shifted_ND.square().sum(1)
            self._error += weight_N @ error_N
        self._waiting.clear()


def fires(codes: SparseCodes) -> Tensor:
    """[M] int64: on how many rows each latent is active; a latent picked twice for a row counts once."""
    row, index, _ = codes.coo()
    distinct = torch.unique(row * codes.d_sae + index.long())
    return torch.bincount(distinct % codes.d_sae, minlength=codes.d_sae)


def reconstruction_metrics(sae: SAE, x_batches: Iterable[Tensor]) -> ReconstructionMetrics:
    """Measure ``sae`` on batches of rows [n, d_in] of any float dtype; see ReconstructionMetrics.

    Raises:
        UserError: an activation is NaN or infinite, or all rows are equal.
    """
    meter = ReconstructionMeter(sae)
    for x_ND in x_batches:
        meter.update(x_ND)
    return meter.result()
