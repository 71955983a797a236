"""The reliability campaign: python -m tests.torture [--minutes N] [--seed N] [--only PART ...] [--out FILE].

Every part is a module of this folder with ``run(folder, seed, seconds) -> Outcome``: it works inside the
empty ``folder``, draws everything from ``seed``, and stops soon after ``seconds``. The table goes to standard
output, and as JSON to ``--out``. The exit status is 1 if any attempt failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tests.torture.outcome import Outcome

# Each part with its share of the time.
PARTS = {
    "kills": 0.35,
    "damaged_files": 0.3,
    "full_disks": 0.1,
    "readers": 0.1,
    "hostile_pages": 0.15,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="time for all parts together")
    parser.add_argument("--seed", type=int, default=0, help="every attempt is drawn from it")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--out", type=Path, help="write the table as JSON here")
    options = parser.parse_args(arguments)
    seconds, weight = options.minutes * 60, sum(PARTS[name] for name in options.only)
    outcomes: list[tuple[Outcome, float]] = []
    with tempfile.TemporaryDirectory(prefix="saebench-torture-") as folder:
        for name in options.only:
            place = Path(folder) / name
            place.mkdir()
            part, started = importlib.import_module(f"tests.torture.{name}"), time.monotonic()
            outcome = part.run(place, options.seed, seconds * PARTS[name] / weight)
            outcomes.append((outcome, time.monotonic() - started))
            print(row(*outcomes[-1]), flush=True)
    for outcome, _ in outcomes:
        for failure in outcome.failures:
            print(f"FAILED {outcome.part}: {failure}")
    if options.out:
        rows = [asdict(outcome) | {"seconds": round(took, 1)} for outcome, took in outcomes]
        options.out.write_text(json.dumps({"seed": options.seed, "parts": rows}, indent=1) + "\n")
    return int(any(outcome.failures for outcome, _ in outcomes))


def row(outcome: Outcome, took: float) -> str:
    """One line of the table, in Markdown."""
    notes = ", ".join(f"{count:,} {name}" for name, count in outcome.notes.items())
    tried = f"{outcome.attempts:,} {outcome.unit}{'' if outcome.attempts == 1 else 's'}"
    return f"| {outcome.part} | {tried} | {len(outcome.failures)} | {notes} | {took / 60:.1f} min |"


if __name__ == "__main__":
    sys.exit(main())
