"""Whether a training may begin in a directory, or be resumed there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saebench.core.errors import UserError
from saebench.core.files import is_leftover, remove_leftovers, write_json_atomic
from saebench.runs.layout import RUN_FILE, read_run
from saebench.runs.run import Run

OF_THE_CALL = {"resume", "quiet", "out", "sweep"}
"""Settings of one call of ``train``; they are not written into ``run.json``."""
_MAY_CHANGE = {
    "device",
    "cache",
    "memory",
    "checkpoint_every",
    "tensorboard",
    "wandb",
}
"""Settings that a resumed run may have different: what is learned does not depend on them (but another
device rounds differently)."""


def check(directory: Path, facts: dict[str, Any], *, resume: bool) -> None:
    """Check that ``directory`` is free for the run of these facts, or holds the same run to be resumed.

    Raises:
        UserError: something is there and ``resume`` was not asked for, or it is a different run.
    """
    if not (directory / RUN_FILE).exists():
        foreign = sorted(p.name for p in directory.iterdir() if p.name != ".lock" and not is_leftover(p))
        if foreign:
            raise UserError(
                f"{directory} is not empty (it holds {foreign[0]}) and is not a run; choose another --out"
            )
        return
    if not resume:
        state = "a finished run" if Run(directory).is_finished else "an unfinished run"
        raise UserError(f"{directory} already holds {state}; add --resume to go on, or choose another --out")
    _check_same(read_run(directory), facts, directory)


def begin(directory: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Make a checked ``directory`` this run's own; returns the facts it was first begun with."""
    remove_leftovers(directory)
    if not (directory / RUN_FILE).exists():
        write_json_atomic(directory / RUN_FILE, facts)
    return read_run(directory)


def _check_same(old: dict[str, Any], new: dict[str, Any], directory: Path) -> None:
    for part in ("train", "sae"):
        begun = old.get(part, {})
        for name in {**new[part], **begun}:  # settings at their defaults may be left out of either
            before, value = begun.get(name), new[part].get(name)
            if before != value and name not in _MAY_CHANGE:
                flag = "--" + name.replace("_", "-")
                says = "does not name it" if value is None else f"says {value}"
                raise UserError(
                    f"{directory} was begun with {flag} {before} and this call {says}; "
                    "resume with the same settings or choose another --out"
                )
    if old.get("cache_hash") != new["cache_hash"]:
        raise UserError(
            f"{directory} was begun on another cache than {new['train']['cache']} (its contents differ); "
            "resume with the same cache or choose another --out"
        )
