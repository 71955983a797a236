"""The process that does long work for a page: ``python -m saebench_app.worker SERVER KIND ARGUMENTS FOLDER``.

SERVER is the id of the process that wants it, and ARGUMENTS are JSON. The result appears whole in FOLDER, or
not at all. Standard output carries nothing but events (`saebench.core.progress.Events`): progress, one error,
or the result. Once its server has ended, the process is interrupted, as by Ctrl-C.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.core.errors import UserError
from saebench.core.files import hold, remove_dead, sync_directory, write_json_atomic
from saebench.core.progress import Events, send_events
from saebench.core.refusals import refusal
from saebench_app.lifeline import end_after, until_orphaned
from saebench_app.offline import stay_offline

if TYPE_CHECKING:
    import pandas as pd

    from saebench.runs.run import Run

SECONDS_BETWEEN_CHECKS = 1.0
"""Between two checks whether the server still runs."""
CLUSTERS = 8
"""Clusters of a map: as many as there are colors that are easy to tell apart."""

Tables = dict[str, "pd.DataFrame"]


def check(store: str) -> tuple[dict[str, Any], Tables]:
    from saebench.store.check import check_store
    from saebench.store.publish import read_manifest

    generation = read_manifest(Path(store)).generation
    found = check_store(store, quiet=False)
    findings = [{"where": one.where, "problem": one.problem} for one in found]
    return {"generation": generation, "findings": findings}, {}


def run_with(runs: Sequence[str], sae: Mapping[str, Any]) -> Run:
    """The run whose weights were indexed as ``sae``, of which name, d_sae and sae_hash are given.

    Raises:
        UserError: none of them.
    """
    from saebench.runs.run import Run, find_run

    found = find_run(map(Run, runs), sae)
    if found is None:
        raise UserError(
            f"none of the runs that the explorer knows holds the weights of {sae['name']!r}; stop it and "
            "start it again with --run DIR, the run directory that was indexed"
        )
    return found


def match(
    runs: Sequence[str], a: Mapping[str, Any], b: Mapping[str, Any], by: str, threshold: float
) -> tuple[dict[str, Any], Tables]:
    from saebench.analysis.matching import match as pair
    from saebench.analysis.matching import splits

    run_a, run_b = run_with(runs, a), run_with(runs, b)
    made = pair(run_a, run_b, by, threshold=threshold)
    tables = {"pairs": made.pairs, "unmatched": made.unmatched}
    facts: dict[str, Any] = {
        "by": made.by,
        "threshold": made.threshold,
        "mean_similarity": made.mean_similarity,
        "stability": made.stability,
        "n_rows": made.n_rows,
    }
    if run_a.description()["d_in"] == run_b.description()["d_in"]:
        a_is_narrow = a["d_sae"] <= b["d_sae"]
        facts["narrow"] = "a" if a_is_narrow else "b"
        narrow, wide = (run_a, run_b) if a_is_narrow else (run_b, run_a)
        tables["splits"] = splits(narrow, wide, threshold=threshold)
    return facts, tables


def map_(runs: Sequence[str], sae: Mapping[str, Any], method: str) -> tuple[dict[str, Any], Tables]:
    from saebench.analysis.geometry import decoder_map

    points = decoder_map(run_with(runs, sae), method, n_clusters=min(CLUSTERS, sae["d_sae"]))
    return {"method": method}, {"points": points}


def explain(store: str, sae: str, limit: int | None) -> dict[str, Any]:
    """Find rules and publish them in a new generation of the store, whose number is returned."""
    from saebench.explaining.run import explain as run

    with run(store, sae=sae, limit=limit) as explained:
        return {"generation": explained.generation}


FUNCTIONS: dict[str, Callable[..., tuple[dict[str, Any], Tables]]] = {
    "check": check,
    "match": match,
    "map": map_,
}


def main(server: str, kind: str, arguments: str, folder: str) -> int:
    """Do one task; the exit code: 0 done, 2 a person must change something, 130 interrupted."""
    stay_offline()
    end_after(partial(until_orphaned, int(server), SECONDS_BETWEEN_CHECKS), signal.SIGINT)
    events, given = _open_events(), json.loads(arguments)
    try:
        if kind == "explain":
            events.send("result", **explain(**given))
        else:
            keep(Path(folder), *FUNCTIONS[kind](**given))
            events.send("result", folder=folder)
    except UserError as error:
        events.send("error", message=str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if (sentence := refusal(error)) is None:
            raise
        events.send("error", message=sentence)
        return 2
    return 0


def _open_events() -> Events:
    """Keep standard output for events: what a library prints goes to standard error."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    events = send_events(stream)
    assert events is not None
    return events


def keep(folder: Path, facts: Mapping[str, Any], tables: Tables) -> None:
    """Put a result where `saebench_app.work.found` looks for it."""
    making = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    remove_dead(folder.parent, folder.name)
    making.mkdir(parents=True)
    descriptor = os.open(making, os.O_RDONLY)
    hold(descriptor)
    try:
        for name, table in tables.items():
            table.to_parquet(making / f"{name}.parquet")
        time_now = datetime.now(UTC).isoformat(timespec="seconds")
        write_json_atomic(making / "facts.json", {**facts, "time": time_now})
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(making, folder)
        sync_directory(folder.parent)
    finally:
        os.close(descriptor)
        shutil.rmtree(making, ignore_errors=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(*sys.argv[1:]))
