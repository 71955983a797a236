"""The run that an SAE of the store came from: a store keeps no weights, which some pages need.

Runs are those named on the command line and those in ``runs`` beside the store; no URL can name one. A run
belongs to an SAE when its weights have the hash that the store recorded. What a page then needs, the model
and the SAE, is loaded once and shared by all sessions, which take turns with it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from saebench.core.errors import UserError
from saebench.runs.run import Run
from saebench_app.session import Here, store_path

if TYPE_CHECKING:
    from saebench.analysis.attach import AttachedSAE
    from saebench.sources.models import Model

TURN = threading.Lock()
"""Held by whoever runs the model."""
WAITING = threading.Semaphore(0)
"""Counts those who wait for their turn."""
LOOK_SECONDS = 0.2
"""Between two checks of a waiting page whether it is still open."""


def known_runs() -> list[Run]:
    """Folders that may hold the SAEs of the store: named ones first, then ``runs/*`` beside it."""
    named = [Path(run) for run in sys.argv[2:]]
    beside = store_path().parent / "runs"
    found = [path for path in sorted(beside.iterdir()) if path.is_dir()] if beside.is_dir() else []
    return [Run(path) for path in dict.fromkeys([*named, *found])]


def finished_runs() -> list[Run]:
    """The known runs that hold an SAE; which SAE of the store it is, only its weights tell."""
    return [run for run in known_runs() if run.is_finished]


def run_of(here: Here) -> Run | None:
    """The run whose weights were indexed as the SAE that is shown; None when no known folder holds them."""
    info = here.store.info()
    for run in known_runs():
        if run.may_be(info) and _is_indexed_as(run.path, run.weights_stamp(), info["sae_hash"]):
            return run
    return None


@dataclass(frozen=True)
class Live:
    """An SAE attached to its model, as the analysis functions take them."""

    attached: AttachedSAE
    identity: str
    """Hash of the SAE's weights."""

    def parts(self) -> dict[str, Any]:
        """The arguments sae, model, hook and bos."""
        attached = self.attached
        names = ("sae", "model", "hook")
        return {**{name: getattr(attached, name) for name in names}, "bos": attached.bos is not None}


def live(here: Here) -> Live:
    """The model and the SAE of the page, loaded by whoever comes first. Call it only within ``turn``.

    Raises:
        UserError: no known run holds the SAE, or its model cannot be loaded.
    """
    run = run_of(here)
    if run is None:
        raise UserError(why_no_run(here))
    with st.spinner("Loading the language model and the SAE. This happens once."):
        return _live(str(run), here.store.info()["sae_hash"], run.weights_stamp())


def attached(here: Here) -> AttachedSAE:
    """`live`, as what `saebench.analysis.attach.attach` gives."""
    return live(here).attached


def why_no_run(here: Here, does: str = "runs the model") -> str:
    """What to do when ``run_of`` finds nothing; ``does`` says what the page needs a run for."""
    return (
        f"This page {does}, and a store keeps no weights: end the explorer and start it as "
        f"saebench explore {here.store.path} --run DIR, with the run directory that "
        f"{here.store.sae!r} was indexed from."
    )


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """One page at a time runs the model; the others show that they wait, and can be closed meanwhile."""
    if not TURN.acquire(blocking=False):
        waiting = st.empty()
        WAITING.release()
        try:
            while not TURN.acquire(timeout=LOOK_SECONDS):
                waiting.caption("The model is busy with another page. This one is next.")
        finally:
            WAITING.acquire()
        waiting.empty()
    try:
        yield
    finally:
        TURN.release()


def give_way() -> None:
    """Let a page that waits go first; for long work within ``turn``, between two steps of it."""
    if WAITING.acquire(blocking=False):
        WAITING.release()
        TURN.release()
        time.sleep(LOOK_SECONDS)
        TURN.acquire()


@st.cache_resource(max_entries=64, show_spinner=False)
def _is_indexed_as(run: Path, stamp: tuple[int, int], sae_hash: str) -> bool:
    return Run(run).is_indexed_as({"sae_hash": sae_hash})


@st.cache_resource(max_entries=4, show_spinner=False)
def _live(run: str, identity: str, stamp: tuple[int, int]) -> Live:
    from saebench.analysis.attach import attach

    recorded = Run(run).provenance.model
    model = "cache" if recorded is None else _model(recorded["name"], recorded.get("revision"))
    return Live(attach(run, model), identity)


@st.cache_resource(max_entries=1, show_spinner=False)
def _model(name: str, revision: str | None) -> Model:
    """The model, shared by its SAEs."""
    from saebench.core.device import pick_device
    from saebench.sources.models import load_model

    return load_model(name, revision=revision, device=pick_device("auto"))
