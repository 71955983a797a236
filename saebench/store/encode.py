"""Encoding a cache with any number of SAEs in one pass, which resumes after a kill.

    store/.encoded/journal.jsonl       which work; then, for each step, rows done and files written
    store/.encoded/0/run-00000.parquet codes of the first SAE, see sorted_spill.py

A file counts when the journal (saebench/core/journal.py) lists it, which is after it is on the disk. A pass
that finds the journal of the same work continues after the last step listed, and ends with the same files
as an undisturbed one.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from saebench.core.errors import UserError
from saebench.core.files import make_directory, sha256_file, sha256_json
from saebench.core.journal import Entry, Journal, read_journal
from saebench.core.progress import progress
from saebench.core.reading import check_shape
from saebench.core.shapes import Count, Positive, Sha256, Shape, Text
from saebench.saes.spec import SiteWidth
from saebench.store import sorted_spill
from saebench.store.sites import cache_rows
from saebench.store.sorted_spill import SortedSpill

if TYPE_CHECKING:
    from saebench.activations.cache import ActivationCache
    from saebench.saes.base import SAE

ENCODED = ".encoded"
JOURNAL = "journal.jsonl"


class _File(Shape):
    name: Annotated[Text, Field(pattern=r"^run-[0-9]+\.parquet$")]
    bytes: Count
    sha256: Sha256


class _Step(Shape):
    rows: Positive
    files: list[_File | None]


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """An SAE, the sites whose activations it reads, and the hash of its weights."""

    name: str
    sae: SAE
    sites: tuple[SiteWidth, ...]
    identity: str

    @property
    def read(self) -> str:
        """The names of the sites."""
        return " and ".join(site.name for site in self.sites)


@torch.inference_mode()
def encode(
    directory: Path, encoders: Sequence[Encoder], cache: ActivationCache, *, batch_size: int, quiet: bool
) -> list[SortedSpill]:
    """The codes of every row of ``cache``, sorted by latent: one SortedSpill per SAE.

    Raises:
        UserError: an activation or a code is not finite.
    """
    journal, done, spills = _resume(directory, encoders, _work(encoders, cache, batch_size), cache.n_rows)
    with (
        contextlib.closing(journal),
        progress("encode", total=cache.n_rows, unit="tok", initial=done, quiet=quiet) as bar,
    ):
        for start in range(done, cache.n_rows, batch_size):
            stop = min(start + batch_size, cache.n_rows)
            for encoder, spill in zip(encoders, spills, strict=True):
                try:
                    spill.add(*_codes(encoder, cache, start, stop))
                except UserError:
                    shutil.rmtree(directory)
                    raise
            if stop == cache.n_rows or sum(spill.n_waiting for spill in spills) >= sorted_spill.RUN_SIZE:
                journal.append({"rows": stop, "files": [_described(spill.flush()) for spill in spills]})
            bar.update(stop - start)
    return spills


def _codes(
    encoder: Encoder, cache: ActivationCache, start: int, stop: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """``(latent, row, value)`` of the rows start to stop - 1."""
    batch_ND = cache_rows(cache, encoder.sites, slice(start, stop), encoder.sae.W_dec.device)
    if not batch_ND.isfinite().all():
        row = start + int((~batch_ND.isfinite()).any(1).nonzero()[0])
        raise UserError(
            f"row {row} of {encoder.read} in the cache {cache.path} has values that are not finite; "
            "make the cache again"
        )
    row_S, latent_S, value_S = (part.cpu().numpy() for part in encoder.sae.encode(batch_ND).coo())
    if not np.isfinite(value_S).all():
        raise UserError(f"the SAE {encoder.name!r} gives codes that are not finite; train it again")
    return latent_S, row_S + start, value_S


def _work(encoders: Sequence[Encoder], cache: ActivationCache, batch_size: int) -> str:
    """A hash of all that the codes depend on, the cuts between files included."""
    return sha256_json(
        {
            "format": 1,
            "cache": cache.hash,
            "n_rows": cache.n_rows,
            "batch_size": batch_size,
            "run_size": sorted_spill.RUN_SIZE,
            "torch": torch.__version__,
            "saes": [[encoder.identity, encoder.read, encoder.sae.W_dec.device.type] for encoder in encoders],
        }
    )


def _resume(
    directory: Path, encoders: Sequence[Encoder], work: str, n_rows: int
) -> tuple[Journal, int, list[SortedSpill]]:
    """``(journal, rows done, spills)``: where a killed pass over the same work stopped, or an empty start."""
    steps = _steps(directory, work, len(encoders), n_rows)
    if steps is None:
        shutil.rmtree(directory, ignore_errors=True)
        make_directory(directory)
        steps = []
    journal = Journal(directory / JOURNAL, [{"work": work}, *steps])
    done, spills = steps[-1]["rows"] if steps else 0, []
    for number, encoder in enumerate(encoders):
        folder = directory / str(number)
        names = [step["files"][number]["name"] for step in steps if step["files"][number]]
        if folder.is_dir():
            for path in folder.iterdir():
                if path.name not in names:
                    path.unlink()
        spills.append(SortedSpill(folder, encoder.sae.d_sae, names))
    return journal, done, spills


def _steps(directory: Path, work: str, n_saes: int, n_rows: int) -> list[Entry] | None:
    """The steps that the journal lists, up to the first whose files are not intact; None for other work."""
    entries = read_journal(directory / JOURNAL)
    if not entries or entries[0] != {"work": work}:
        return None
    steps: list[Entry] = []
    for entry in entries[1:]:
        try:
            check_shape(entry, _Step, source="the entry")
        except UserError:
            break
        later = not steps or entry["rows"] > steps[-1]["rows"]
        if not later or len(entry["files"]) != n_saes or entry["rows"] > n_rows:
            break
        if not all(_is_intact(directory / str(n), file) for n, file in enumerate(entry["files"])):
            break
        steps.append(entry)
    return steps


def _described(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _is_intact(folder: Path, file: dict[str, Any] | None) -> bool:
    if file is None:
        return True
    path = folder / file["name"]
    return bool(
        path.is_file() and path.stat().st_size == file["bytes"] and sha256_file(path) == file["sha256"]
    )
