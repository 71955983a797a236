"""The one pass over a cache: the codes of every row, of any number of SAEs, as runs; goes on after a kill.

    store/.encoded/journal.jsonl       of which work; then, for each step: rows done, files written
    store/.encoded/0/run-00000.parquet codes of the first SAE, see runs.py

A file counts when the journal lists it, which is after it is on the disk. A pass that finds the journal of
the same work goes on behind the last step listed, and ends with the same files as an undisturbed one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from saebench.core.errors import UserError
from saebench.core.files import sentence_for_os_errors, sha256_file, sha256_json, sync_directory
from saebench.core.progress import progress
from saebench.store import sorted_spill
from saebench.store.sorted_spill import SortedSpill

if TYPE_CHECKING:
    from saebench.activations.cache import ActivationCache
    from saebench.saes.base import SAE

ENCODED = ".encoded"
JOURNAL = "journal.jsonl"


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """An SAE, the hook whose activations it reads, and what identifies its weights."""

    name: str
    sae: SAE
    hook: str
    identity: str


@torch.inference_mode()
def encode(
    directory: Path, encoders: Sequence[Encoder], cache: ActivationCache, *, batch_size: int, quiet: bool
) -> list[SortedSpill]:
    """The codes of every row of ``cache`` as sorted runs, one a SAE.

    Raises:
        UserError: an activation or a code is not finite.
    """
    done, all_runs = _take_up(directory, encoders, _work(encoders, cache, batch_size))
    with progress("encode", total=cache.n_rows, unit="tok", initial=done, quiet=quiet) as bar:
        for start in range(done, cache.n_rows, batch_size):
            stop = min(start + batch_size, cache.n_rows)
            for encoder, runs in zip(encoders, all_runs, strict=True):
                try:
                    runs.add(*_codes(encoder, cache, start, stop))
                except UserError:
                    shutil.rmtree(directory)
                    raise
            if stop == cache.n_rows or sum(runs.n_waiting for runs in all_runs) >= sorted_spill.RUN_SIZE:
                _note(directory, {"rows": stop, "files": [_described(runs.flush()) for runs in all_runs]})
            bar.update(stop - start)
    return all_runs


def _codes(
    encoder: Encoder, cache: ActivationCache, start: int, stop: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """``(latent, row, value)`` of the rows start to stop - 1."""
    batch_ND = cache.activations(encoder.hook)[start:stop].to(encoder.sae.W_dec.device, torch.float32)
    if not batch_ND.isfinite().all():
        row = start + int((~batch_ND.isfinite()).any(1).nonzero()[0])
        raise UserError(
            f"row {row} of {encoder.hook} in the cache {cache.path} has values that are not finite; "
            "make the cache again"
        )
    row_S, latent_S, value_S = (part.cpu().numpy() for part in encoder.sae.encode(batch_ND).coo())
    if not np.isfinite(value_S).all():
        raise UserError(f"the SAE {encoder.name!r} gives codes that are not finite; train it again")
    return latent_S, row_S + start, value_S


def _work(encoders: Sequence[Encoder], cache: ActivationCache, batch_size: int) -> str:
    """A hash of all that the codes depend on, the cuts between files included."""
    return sha256_json({
        "format": 1, "cache": cache.hash, "n_rows": cache.n_rows, "batch_size": batch_size,
        "run_size": sorted_spill.RUN_SIZE, "torch": torch.__version__,
        "saes": [
            [encoder.identity, encoder.hook, encoder.sae.W_dec.device.type] for encoder in encoders
        ],
    })  # fmt: skip


def _take_up(directory: Path, encoders: Sequence[Encoder], work: str) -> tuple[int, list[SortedSpill]]:
    """``(rows done, runs)``: where a killed pass over the same work stopped, or an empty beginning."""
    steps = _steps(directory, work)
    if steps is None:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        _note(directory, {"work": work})
        steps = []
    done, all_runs = steps[-1]["rows"] if steps else 0, []
    for number, encoder in enumerate(encoders):
        folder = directory / str(number)
        names = [step["files"][number]["name"] for step in steps if step["files"][number]]
        if folder.is_dir():
            for path in folder.iterdir():
                if path.name not in names:
                    path.unlink()
        all_runs.append(SortedSpill(folder, encoder.sae.d_sae, names))
    return done, all_runs


def _steps(directory: Path, work: str) -> list[dict[str, Any]] | None:
    """The steps that the journal lists and whose files are whole; None without a journal of this work.

    What a kill left of a last line, and what follows a damaged file, is cut off.
    """
    journal = directory / JOURNAL
    if not journal.is_file():
        return None
    lines = journal.read_bytes().splitlines(keepends=True)
    kept: list[bytes] = []
    steps: list[dict[str, Any]] = []
    for line in lines:
        try:
            entry = json.loads(line)
            if not line.endswith(b"\n"):
                break
            if not kept:
                if entry != {"work": work}:
                    return None
            elif all(_is_whole(directory / str(n), file) for n, file in enumerate(entry["files"])):
                steps.append(entry)
            else:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line)
    if not kept:
        return None
    if kept != lines:
        with open(journal, "r+b") as file:
            file.truncate(sum(map(len, kept)))
            os.fsync(file.fileno())
    return steps


def _described(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _is_whole(folder: Path, file: dict[str, Any] | None) -> bool:
    if file is None:
        return True
    path, size = folder / file["name"], int(file["bytes"])
    return path.is_file() and path.stat().st_size == size and sha256_file(path) == str(file["sha256"])


def _note(directory: Path, entry: dict[str, Any]) -> None:
    path = directory / JOURNAL
    with sentence_for_os_errors(path), open(path, "ab") as file:
        file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    sync_directory(directory)
