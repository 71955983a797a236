"""ActivationSource: what a harvest needs of whatever makes activations, and the sites that it has.

A source gives batches of units (contexts of a text, images, vectors). A unit becomes one or more rows of the
cache. What the columns of rows and units mean belongs to the source's modality (modality.py).

Shapes: N rows, U units, D width of a site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

SitePath = Literal["native", "bridge", "module", "array", "engine"]
Axes = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Site:
    """A place whose activations a cache stores.

    Args:
        name: TransformerLens name of the hook, or path of the module.
        axes: name and size of each axis of one row as the model has it: (("head", 12), ("d_head", 64)).
        dtype: the type that the rows are stored in: bf16, fp16 or fp32.
        path: what gave the activations; None in caches that do not record it.
    """

    name: str
    axes: Axes
    dtype: str
    path: SitePath | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes."""
        return tuple(size for _, size in self.axes)

    @property
    def d_in(self) -> int:
        """Width of a row with its axes flattened, which is how rows are stored."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ColumnType:
    """Type of a column: ``dtype`` is bf16, fp16, fp32, int32 or bool; ``row_shape`` the shape of one row."""

    dtype: str
    row_shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class UnitBatch:
    """Some units, in order.

    Args:
        rows: column -> one entry for each row of these units, [N].
        units: column -> one entry for each unit, [U, ...].
        activations: computes columns -> [N, D], on any device; not called for rows that are stored already.
        left_out: how much of what was read for these units has no row, by reason; shown to people, and kept.
    """

    rows: Mapping[str, Tensor]
    units: Mapping[str, Tensor]
    activations: Callable[[], Mapping[str, Tensor]]
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def n_rows(self) -> int:
        return len(next(iter(self.rows.values())))


class ActivationSource(Protocol):
    """Something that makes activations. `saebench.activations.writing.write_cache` stores them.

    The methods are called in the order in which they are listed. All that a user can do wrong raises a
    UserError, as early as it can be known.
    """

    modality: str
    """Name of the modality, which says what rows and units are; see modality.py."""
    kind: Literal["harvest", "import"]

    def identity(self) -> dict[str, Any]:
        """JSON that says what the activations are made of, with a key ``settings``; see the cache's format.

        Equal identities must give equal rows: a cache is continued only if its identity is the same.
        """

    def prepare(self) -> None:
        """Checks that need more than the identity does, before the directory is locked."""

    def open(self) -> Mapping[str, Site]:
        """Load what is needed, and return the sites by name, in order."""

    def columns(self) -> Mapping[str, ColumnType]:
        """All columns, those of the sites included; called after ``open``."""

    def batches(self) -> Iterator[UnitBatch]:
        """All units, in an order that is the same each time."""

    def files(self) -> Mapping[str, bytes]:
        """Further files of the cache; called after the last batch."""

    def nonfinite(self, column: str, batch: UnitBatch, row: int) -> str:
        """The error sentence for NaN or infinity in ``column`` at row ``row`` of a batch."""
