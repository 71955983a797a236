"""``World``, a distribution of rows made of known features, and ``GroundTruth``, rows with their features.

Shapes: N rows, F true features, D = d_in, C classes of a readout.
"""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from saebench.core.codes import SparseCodes
from saebench_kernels import sparse_decode

Part = Literal["train", "test"]
CHUNK_ROWS = 8192
"""Rows drawn at once, so that the first rows of a part do not depend on how many are drawn."""


@dataclass(frozen=True, eq=False)
class Readout:
    """A linear classifier that reads the rows; gradients of the rows are those of its loss."""

    W_DC: Tensor
    """[d_in, C]: logits are x W."""
    label_N: Tensor
    """[N] int64, drawn from the softmax of the true rows' logits."""

    def cross_entropy(self, x_ND: Tensor) -> Tensor:
        """[N]: cross entropy of the labels when the classifier reads ``x_ND``, in nats."""
        return torch.nn.functional.cross_entropy(x_ND @ self.W_DC, self.label_N, reduction="none")

    def gradient(self, x_ND: Tensor) -> Tensor:
        """[N, d_in]: d cross_entropy[n] / d x[n] = (softmax(x W) - onehot(label)) W^T, in closed form."""
        surprise_NC = (x_ND @ self.W_DC).softmax(dim=1)
        surprise_NC[torch.arange(len(x_ND)), self.label_N] -= 1
        return surprise_NC @ self.W_DC.T


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class GroundTruth:
    """Rows x = z D with their codes and features, on the CPU."""

    x_ND: Tensor
    """[N, d_in] float32."""
    features_FD: Tensor
    """[F, d_in] float32, unit rows: the true dictionary."""
    codes: SparseCodes
    """True activations z, positive and ragged; indices within a row are ascending."""
    groups: Mapping[str, Tensor] = field(default_factory=dict)
    """Name -> int64 indices of the features that belong together."""
    readout: Readout | None = None
    """The downstream classifier, if this world has one."""

    @property
    def gradient_ND(self) -> Tensor | None:
        """[N, d_in]: gradient of the readout's cross entropy at each row; None without a readout."""
        return None if self.readout is None else self.readout.gradient(self.x_ND)

    @property
    def n_rows(self) -> int:
        return self.x_ND.shape[0]

    @property
    def n_features(self) -> int:
        return self.features_FD.shape[0]

    @property
    def d_in(self) -> int:
        return self.features_FD.shape[1]

    def frequency(self) -> Tensor:
        """[F] float64: the share of these rows in which each feature is active."""
        counts_F = torch.bincount(self.codes.coo()[1].long(), minlength=self.n_features)
        return counts_F.double() / self.n_rows

    def __repr__(self) -> str:
        return f"GroundTruth({self.n_rows:,} rows of {self.d_in} dimensions, {self.n_features} features)"


@dataclass(frozen=True, kw_only=True)
class World(ABC):
    """A distribution of rows; the fields are its parameters.

    ``seed`` determines everything. Train and test rows use separate random streams and the same dictionary.
    The parameters do not change the random streams: two worlds of one class that differ only in a parameter
    draw the same random numbers.
    """

    seed: int = 0

    @abstractmethod
    def draw_features(self, generator: torch.Generator) -> Tensor:
        """[F, d_in] float32, unit rows."""

    @abstractmethod
    def draw_strengths(self, n_rows: int, generator: torch.Generator) -> Tensor:
        """[n_rows, F] float32: the activation of each feature; 0 if it is absent, never negative."""

    def groups(self) -> dict[str, Tensor]:
        """Name -> int64 indices of the features that belong together."""
        return {}

    def readout_weights(self) -> Tensor | None:
        """[d_in, C] float32, or None if no classifier reads the rows."""
        return None

    @functools.cached_property
    def features_FD(self) -> Tensor:
        """[F, d_in] float32, unit rows."""
        return self.draw_features(self.generator("features"))

    def chunks(self, n_rows: int, *, part: Part = "train") -> Iterator[GroundTruth]:
        """The first ``n_rows`` rows of a part, at most CHUNK_ROWS at a time."""
        for chunk, start in enumerate(range(0, n_rows, CHUNK_ROWS)):
            generator = self.generator(part, chunk)
            strengths_NF = self.draw_strengths(CHUNK_ROWS, generator)
            labels_N = self._draw_labels(strengths_NF, generator)
            size = min(CHUNK_ROWS, n_rows - start)
            yield self._truth(strengths_NF[:size], None if labels_N is None else labels_N[:size])

    def sample(self, n_rows: int, *, part: Part = "train") -> GroundTruth:
        """The first ``n_rows`` rows of a part, in memory."""
        pieces = list(self.chunks(n_rows, part=part))
        readouts = [piece.readout for piece in pieces if piece.readout is not None]
        return GroundTruth(
            x_ND=torch.cat([piece.x_ND for piece in pieces]),
            features_FD=self.features_FD,
            codes=join_codes([piece.codes for piece in pieces]),
            groups=self.groups(),
            readout=Readout(readouts[0].W_DC, torch.cat([r.label_N for r in readouts])) if readouts else None,
        )

    def generator(self, *key: int | str) -> torch.Generator:
        """A generator that depends only on the class, ``seed`` and ``key``."""
        name = repr((type(self).__name__, self.seed, *key)).encode()
        seed = int.from_bytes(hashlib.sha256(name).digest()[:8], "little") >> 1
        return torch.Generator().manual_seed(seed)

    def _draw_labels(self, strengths_NF: Tensor, generator: torch.Generator) -> Tensor | None:
        """[N] int64, from the softmax of the logits; None without a readout."""
        W_DC = self.readout_weights()
        if W_DC is None:
            return None
        logits_NC = _decode(_ragged(strengths_NF), self.features_FD) @ W_DC
        return torch.multinomial(logits_NC.softmax(dim=1), 1, generator=generator)[:, 0]

    def _truth(self, strengths_NF: Tensor, labels_N: Tensor | None) -> GroundTruth:
        codes, W_DC = _ragged(strengths_NF), self.readout_weights()
        return GroundTruth(
            x_ND=_decode(codes, self.features_FD),
            features_FD=self.features_FD,
            codes=codes,
            groups=self.groups(),
            readout=Readout(W_DC, labels_N) if W_DC is not None and labels_N is not None else None,
        )


def join_codes(pieces: Sequence[SparseCodes]) -> SparseCodes:
    """The codes of consecutive rows as one, ragged."""
    lengths = torch.cat([piece.row_offsets.diff() for piece in pieces])
    return SparseCodes.from_ragged(
        torch.cat([piece.values for piece in pieces]),
        torch.cat([piece.indices for piece in pieces]),
        torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        d_sae=pieces[0].d_sae,
    )


def unit_rows(rows_FD: Tensor) -> Tensor:
    """Each row divided by its norm."""
    return torch.nn.functional.normalize(rows_FD)


def _ragged(strengths_NF: Tensor) -> SparseCodes:
    row_S, index_S = strengths_NF.nonzero(as_tuple=True)
    counts_N = torch.bincount(row_S, minlength=len(strengths_NF))
    offsets = torch.cat([counts_N.new_zeros(1), counts_N.cumsum(0)])
    d_sae = strengths_NF.shape[1]
    return SparseCodes.from_ragged(strengths_NF[row_S, index_S], index_S, offsets, d_sae=d_sae)


@torch.no_grad()
def _decode(codes: SparseCodes, features_FD: Tensor) -> Tensor:
    zeros_D = features_FD.new_zeros(features_FD.shape[1])
    return sparse_decode(codes.values, codes.entries, features_FD, zeros_D)
