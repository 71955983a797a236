"""write_cache: run an ActivationSource once and store its activations; resumes after a kill.

Shapes: N rows, D width of a site.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saebench.activations.cache import ActivationCache, open_cache
from saebench.activations.diagnosis import advice
from saebench.activations.manifest import GRADIENT_PREFIX, HOOK_PREFIX
from saebench.activations.max_norm import REASON, MaxNorm
from saebench.activations.shards import TORCH_DTYPES
from saebench.activations.writer import CacheWriter, inspect_target
from saebench.core.errors import UserError
from saebench.core.files import directory_lock
from saebench.core.prefetch import prefetch
from saebench.core.progress import progress
from saebench.sources.base import ActivationSource, ColumnType, UnitBatch
from saebench.sources.modality import TEXT, modality

_BATCHES_AHEAD = 4


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where and how `write_cache` writes. ``total`` is the expected number of rows, if it is known."""

    out: Path
    shard_rows: int
    quiet: bool
    total: int | None = None
    unit: str = "row"
    max_norm: float | None = None
    """Multiple of the median norm above which rows are left out; see max_norm.py."""

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr)


def write_cache(
    source: ActivationSource, target: Target, *, facts: Callable[[], Mapping[str, Any]] = dict
) -> tuple[ActivationCache, bool]:
    """The cache of all that ``source`` gives, in the directory of ``target``; False if it was there already.

    A complete cache of the same identity is opened, an unfinished one is continued, to the same bytes.
    ``facts`` gives further keys of the manifest, at the end.

    Raises:
        UserError: the directory holds something else, NaN or infinite activations, a full disk, no rows.
    """
    identity = source.identity()
    if inspect_target(target.out, identity) == "complete":
        target.say(f"{target.out} is complete already; nothing to do")
        return open_cache(target.out), False
    source.prepare()
    with directory_lock(target.out, what="the activation cache"):
        state = inspect_target(target.out, identity)
        if state == "complete":  # another process has finished it in the meantime
            return open_cache(target.out), False
        sites = source.open()
        columns = source.columns()
        with CacheWriter(
            target.out,
            kind=source.kind,
            sites=sites,
            modality=source.modality,
            columns=columns,
            shard_rows=target.shard_rows,
            identity=identity,
        ) as writer:
            if state == "unfinished":
                target.say(f"resuming {target.out} at row {writer.rows.keeps:,}")
            left_out = _write_units(source, columns, target, writer)
            writer.facts |= facts()
            writer.finish(source.files(), left_out={name: n for name, n in left_out.items() if n})
    return warn_of_diagnosis(open_cache(target.out)), True


def warn_of_diagnosis(cache: ActivationCache) -> ActivationCache:
    """Print what is off in a new cache."""
    for sentence in advice(cache.diagnosis, of_text=cache.modality is TEXT):
        print(f"warning: {sentence}", file=sys.stderr)
    return cache


def _write_units(
    source: ActivationSource, columns: Mapping[str, ColumnType], target: Target, writer: CacheWriter
) -> Counter[str]:
    """Run the source over its units and append their rows; returns how much was left out, by reason.

    Batches whose rows are on disk already are counted without computing their activations. A GPU computes one
    batch while the previous one is stored.
    """
    left_out: Counter[str] = Counter()
    limits = None
    if target.max_norm is not None:
        limits = MaxNorm(target.max_norm, writer, modality(source.modality).unit_column)
    kept = writer.rows.keeps
    ahead = prefetch(source.batches(), _BATCHES_AHEAD)
    total, unit, quiet = target.total, target.unit, target.quiet
    with (
        contextlib.closing(ahead) as made,
        progress(source.kind, total=total, unit=unit, initial=kept, quiet=quiet) as bar,
    ):

        def store(batch: UnitBatch, activations: Mapping[str, Tensor]) -> None:
            here = {name: column.cpu() for name, column in activations.items()}
            for name, rows_ND in here.items():
                bad_N = ~torch.isfinite(rows_ND).all(dim=1)
                if bad_N.any():
                    raise UserError(source.nonfinite(name, batch, int(bad_N.nonzero()[0])))
            rows = {**here, **batch.rows}
            if limits is not None:
                keep_N = limits.keep(here)
                rows = {name: column[keep_N] for name, column in rows.items()}
                left_out[REASON] += int((~keep_N).sum())
            writer.rows.append(rows)
            bar.update(batch.n_rows)

        pending: tuple[UnitBatch, Mapping[str, Tensor]] | None = None
        for batch in made:
            left_out.update(batch.left_out)
            if batch.units:
                writer.contexts.append(batch.units)
            n_stored = batch.n_rows if limits is None else limits.rows_on_disk(batch)
            if n_stored is not None and writer.rows.position + n_stored <= kept:
                writer.rows.skip(n_stored)
                if limits is not None:
                    left_out[REASON] += batch.n_rows - n_stored
                continue
            computed = in_stored_types(batch.activations(), columns)
            if pending is not None:
                store(*pending)
            pending = batch, computed
        if pending is not None:
            store(*pending)
    if limits is not None and writer.rows.position == 0:
        raise UserError(f"--max-norm {target.max_norm:g} leaves no row; give a larger multiple")
    return left_out


def in_stored_types(
    activations: Mapping[str, Tensor], columns: Mapping[str, ColumnType]
) -> dict[str, Tensor]:
    """The columns of activations and gradients, each in its stored type."""
    return {
        name: activations[name].to(TORCH_DTYPES[kind.dtype])
        for name, kind in columns.items()
        if name.startswith((HOOK_PREFIX, GRADIENT_PREFIX))
    }


def split_column(column: str) -> tuple[str, str]:
    """``("activations" or "gradients", site)`` of such a column."""
    kind, _, site = column.partition("/")
    return ("gradients" if kind == "gradient" else "activations"), site


def warn_of_held_out(cache: ActivationCache, way_out: str) -> None:
    """Print a warning if none or all of the rows are held out from training."""
    held_out = int(cache.held_out.sum())
    if held_out in (0, cache.n_rows):
        some = "none" if held_out == 0 else "all"
        of = "document" if cache.tokens is not None else cache.modality.unit
        print(
            f"warning: {some} of the {cache.n_rows:,} rows are held out (about 1 {of} in 20 is); {way_out} "
            "before training or evaluating on this cache",
            file=sys.stderr,
        )
