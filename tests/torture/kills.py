"""Kills: every command that writes is ended by SIGKILL at random instants, then run again until it succeeds.

The result must be that of an undisturbed run, and no temporary file may be left. Commands run in forks of a
process that has imported what they need, so that the instants fall into the work and not into the start.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from saebench.core.files import sha256_file
from tests.torture.damaged_files import make_world
from tests.torture.full_disks import WRITERS, Writer, command, prepare
from tests.torture.outcome import Outcome

LONGEST = 180.0
"""Seconds after which an undisturbed command counts as one that hangs."""
MOST_KILLS = 3
TIMES = {"seconds", "tokens_per_second", "data_wait"}
_FORK = multiprocessing.get_context("fork")


def run(folder: Path, seed: int, seconds: float) -> Outcome:
    """Kill commands for about ``seconds``."""
    in_child(make_world, folder / "world")
    return kill(folder, seed, seconds, list(WRITERS))


def kill(folder: Path, seed: int, seconds: float, names: list[str]) -> Outcome:
    """As `run`, for the writers with these ``names``; the world is in ``folder``."""
    import saebench.cli.commands  # noqa: F401 (for the children)

    torch.set_num_threads(1)
    rng, outcome = random.Random(seed), Outcome("kills of commands that write", "kill")
    deadline = time.monotonic() + seconds
    disk = folder / "killed"
    disk.mkdir()
    usual = {name: undisturbed(WRITERS[name], folder / "world", disk, name) for name in names}
    rng.shuffle(names)
    number = 0
    while number < len(names) or time.monotonic() < deadline:
        name = names[number % len(names)]
        number += 1
        result, took = usual[name]
        delays = [rng.random() * took for _ in range(rng.randint(1, MOST_KILLS))]
        kills, fault = chain(WRITERS[name], folder / "world", disk, name, delays, result)
        outcome.attempts += kills
        outcome.count(name, kills)
        if fault:
            after = ", ".join(f"{delay:.2f}" for delay in delays)
            outcome.failures.append(f"{name} killed after {after} s (seed {seed}): {fault}")
    return outcome


def undisturbed(writer: Writer, world: Path, disk: Path, name: str) -> tuple[Any, float]:
    """The result of a writer, and the seconds that its command takes."""
    prepare(writer, world, disk)
    started = time.monotonic()
    code, error = in_child(command, writer.words(world, disk))
    took = time.monotonic() - started
    assert code == 0, (name, error)
    return in_child(result_of, writer, name, disk), took


def chain(
    writer: Writer, world: Path, disk: Path, name: str, delays: list[float], result: Any
) -> tuple[int, str]:
    """Kills that met the running command, and what was wrong afterwards, or ""."""
    prepare(writer, world, disk)
    words, kills = writer.words(world, disk), 0
    for delay in delays:
        if not killed(words, delay):
            break
        kills += 1
        words = [*writer.words(world, disk), *writer.again]
    else:
        try:
            code, error = in_child(command, words)
        except (EOFError, TimeoutError) as ended:
            return kills, f"the next run {ended or 'died'}"
        if code != 0 or "Traceback" in error:
            return kills, f"the next run ends with {code}: {error[-300:]!r}"
    if in_child(result_of, writer, name, disk) != result:
        return kills, "another result"
    left = [path.name for path in disk.rglob("*") if ".partial" in path.name]
    return kills, f"{left[0]} is left" if left else ""


def result_of(writer: Writer, name: str, disk: Path) -> Any:
    if name != "train":
        return writer.result(disk)
    made = disk / "made"
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
    return sha256_file(made / "sae.safetensors"), kept, sorted(path.name for path in made.iterdir())


def in_child(task: Callable[..., Any], *arguments: Any) -> Any:
    """What ``task`` returns in a fork of this process.

    Raises:
        TimeoutError: it did not end.
        EOFError: it ended without a result.
    """
    ours, theirs = _FORK.Pipe(duplex=False)
    child = _FORK.Process(target=_run, args=(theirs, task, arguments))
    child.start()
    theirs.close()
    try:
        if not ours.poll(LONGEST):
            raise TimeoutError(f"does not end within {LONGEST:.0f} s")
        return ours.recv()
    finally:
        child.kill()
        child.join()
        ours.close()


def killed(words: list[str], delay: float) -> bool:
    """Run a command in a fork and kill it after ``delay`` seconds; False if it had ended before."""
    child = _FORK.Process(target=_run, args=(None, command, (words,)))
    child.start()
    child.join(delay)
    child.kill()
    child.join()
    return child.exitcode == -signal.SIGKILL


def _run(answer: Connection | None, task: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    found = task(*arguments)
    if answer is not None:
        answer.send(found)
    os._exit(0)
