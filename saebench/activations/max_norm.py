"""Leaving out rows of huge norm, such as attention sinks: harvest --max-norm.

A row is left out if its norm at any site is above the site's limit: a multiple of the median norm of the rows
of the first batch. Norms are those of the stored values, computed in float32 on the CPU. The limits are in
the journal before any row is, and in the manifest, so a resumed harvest keeps the same rows.

Shapes: N rows of a batch, D width of a site.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saebench.activations.manifest import HOOK_PREFIX
from saebench.activations.mapping import map_column
from saebench.activations.writer import CacheWriter
from saebench.core.errors import UserError
from saebench.sources.base import UnitBatch

FACT = "max_norm"
"""Key of the limits in the manifest: {"median": {site: norm}, "limit": {site: norm}}."""
REASON = "above_max_norm"


class MaxNorm:
    """Chooses the rows of one cache that are not above its limits."""

    def __init__(self, multiple: float, writer: CacheWriter, unit_column: str) -> None:
        self._multiple, self._writer, self._unit_column = multiple, writer, unit_column
        stored = writer.rows.columns().get(unit_column)
        self._units_on_disk = (
            map_column(writer.path, unit_column, stored) if stored and stored.shards else torch.empty(0)
        )

    def rows_on_disk(self, batch: UnitBatch) -> int | None:
        """The number of rows of ``batch`` that are on disk, if these are all; else None."""
        if not batch.n_rows:
            return 0
        units_N, stored_M = batch.rows[self._unit_column], self._units_on_disk
        first, last = int(units_N[0]), int(units_N[-1])
        if len(stored_M) == 0 or int(stored_M[-1]) <= last:  # it may be in the middle of the unit
            return None
        start, end = torch.searchsorted(stored_M, torch.tensor([first, last + 1], dtype=stored_M.dtype))
        return int(end - start)

    def keep(self, activations: Mapping[str, Tensor]) -> Tensor:
        """Bool [N]: the rows to store, of columns [N, D] in their stored types, on the CPU.

        Raises:
            UserError: the median norm at a site is 0.
        """
        norms = {
            name.removeprefix(HOOK_PREFIX): torch.linalg.vector_norm(rows_ND.float(), dim=1)
            for name, rows_ND in activations.items()
            if name.startswith(HOOK_PREFIX)
        }
        limits = self._limits(norms)
        return torch.stack([norm_N <= limits[site] for site, norm_N in norms.items()]).all(dim=0)

    def _limits(self, norms: Mapping[str, Tensor]) -> Mapping[str, float]:
        facts: dict[str, Any] | None = self._writer.facts.get(FACT)
        if facts is None:
            median = {site: float(norm_N.median()) for site, norm_N in norms.items()}
            for site, norm in median.items():
                if norm == 0:
                    raise UserError(
                        f"the median norm at {site} is 0, so --max-norm has no meaning there; leave it out"
                    )
            facts = {
                "median": median,
                "limit": {site: self._multiple * norm for site, norm in median.items()},
            }
            self._writer.note(FACT, facts)
        limits: Mapping[str, float] = facts["limit"]
        return limits
