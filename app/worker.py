"""The process that does long work for a page: ``python -m saebench_app.worker SERVER KIND ARGUMENTS FOLDER``.

SERVER is the number of the process that wants it, and ARGUMENTS are JSON. The result appears whole in FOLDER,
or not at all. Progress goes to standard error, a line every half second; so does the one sentence of what
went wrong. It ends when its server has gone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import saebench.progress
from saebench.errors import UserError
from saebench.files import sync_directory, write_json_atomic

if TYPE_CHECKING:
    import pandas as pd

LINES_APART = 0.5
LOOKS_APART = 1.0

Tables = dict[str, "pd.DataFrame"]


def check(store: str) -> tuple[dict[str, Any], Tables]:
    from saebench.store.check import check_store
    from saebench.store.publish import read_manifest

    generation = read_manifest(Path(store)).generation
    found = check_store(store, quiet=False)
    findings = [{"where": one.where, "problem": one.problem} for one in found]
    return {"generation": generation, "findings": findings}, {}


def match(a: str, b: str, by: str, threshold: float) -> tuple[dict[str, Any], Tables]:
    from saebench.analysis.matching import match as pair
    from saebench.analysis.matching import splits
    from saebench.saes.base import load

    made = pair(a, b, by, threshold=threshold)
    tables = {"pairs": made.pairs, "unmatched": made.unmatched}
    facts: dict[str, Any] = {
        "by": made.by, "threshold": made.threshold, "mean_similarity": made.mean_similarity,
        "stability": made.stability, "n_rows": made.n_rows,
    }  # fmt: skip
    one, other = load(a), load(b)
    if one.d_in == other.d_in:
        narrow, wide = (a, b) if one.d_sae <= other.d_sae else (b, a)
        facts["narrow"] = "a" if narrow == a else "b"
        tables["splits"] = splits(narrow, wide, threshold=threshold)
    return facts, tables


def map_(run: str, method: str) -> tuple[dict[str, Any], Tables]:
    from saebench.analysis.geometry import decoder_map
    from saebench.saes.base import load

    clusters = min(8, load(run).d_sae)
    return {"method": method}, {"points": decoder_map(run, method, n_clusters=clusters)}


def explain(store: str, sae: str, limit: int | None) -> int:
    """The command line's own, which publishes a new generation of the store."""
    from saebench.cli import main as command

    words = ["explain", store, "--sae", sae]
    return command([*words, *(["--limit", str(limit)] if limit else [])])


FUNCTIONS: dict[str, Callable[..., tuple[dict[str, Any], Tables]]] = {
    "check": check,
    "match": match,
    "map": map_,
}


def main(server: str, kind: str, arguments: str, folder: str) -> int:
    saebench.progress.SECONDS_BETWEEN_LINES = LINES_APART
    threading.Thread(target=_end_with, args=(int(server),), daemon=True).start()
    given = json.loads(arguments)
    try:
        if kind == "explain":
            return explain(**given)
        keep(Path(folder), *FUNCTIONS[kind](**given))
    except UserError as error:
        print(f"saebench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def keep(folder: Path, facts: Mapping[str, Any], tables: Tables) -> None:
    """Put a result where `saebench_app.work.found` looks for it."""
    making = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    making.mkdir(parents=True)
    try:
        for name, table in tables.items():
            table.to_parquet(making / f"{name}.parquet")
        time_now = datetime.now(UTC).isoformat(timespec="seconds")
        write_json_atomic(making / "facts.json", {**facts, "time": time_now})
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(making, folder)
        sync_directory(folder.parent)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _end_with(server: int) -> None:
    """Interrupt this process, as Ctrl-C does, once the one that started it has gone."""
    while os.getppid() == server:
        time.sleep(LOOKS_APART)
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(*sys.argv[1:]))
