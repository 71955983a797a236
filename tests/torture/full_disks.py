"""Full disks: every command that writes meets a full disk, or a limit of the size of files, at any stage.

It must end with exit code 2 and one sentence, leave what was there before as it was, and give its usual
result when it is run again with enough space. The disk is a tmpfs where the system permits to mount one.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from saebench.core.errors import one_line
from saebench.core.files import sha256_file
from tests.torture.damaged_files import make_world, quiet
from tests.torture.outcome import Outcome

MARGIN = 4096
SIZE = 96 * 2**20


@dataclass(frozen=True)
class Writer:
    """A command that writes into ``disk``; ``again`` is added to its words when it is run again.

    ``before`` are folders of the world that are copied to the disk first. ``result`` is what it should give,
    and ``state`` what was there before and must stay readable.
    """

    words: Callable[[Path, Path], list[str]]
    result: Callable[[Path], Any]
    again: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    state: Callable[[Path], Any] = lambda disk: None


def run(folder: Path, seed: int, seconds: float) -> Outcome:
    """Let commands meet full disks for about ``seconds``."""
    make_world(folder / "world")
    return meet(folder, seed, seconds, list(WRITERS))


def meet(folder: Path, seed: int, seconds: float, names: list[str]) -> Outcome:
    """As `run`, for the writers with these ``names``; the world is in ``folder``."""
    rng, outcome = random.Random(seed), Outcome("full disks and file-size limits", "attempt")
    deadline = time.monotonic() + seconds
    world = folder / "world"
    with disk_at(folder / "disk") as (disk, is_mount), mock.patch.dict(os.environ, HF_HUB_OFFLINE="1"):
        usual = {name: undisturbed(WRITERS[name], world, disk) for name in names}
        rng.shuffle(names)
        number = 0
        while number < len(names) or time.monotonic() < deadline:
            name = names[number % len(names)]
            number += 1
            result, state, used, largest = usual[name]
            full = is_mount and rng.random() < 0.6
            at = int(rng.random() * (used if full else largest) * 1.05)
            found = attempt(WRITERS[name], world, disk, at, full=full, result=result, state=state)
            outcome.attempts += 1
            if found.startswith("FAILED"):
                kind = "free bytes" if full else "bytes per file"
                outcome.failures.append(f"{name} with {at} {kind} (seed {seed}): {found}")
            else:
                outcome.count(found)
            outcome.count("full disks" if full else "limits of file sizes")
    return outcome


def undisturbed(writer: Writer, world: Path, disk: Path) -> tuple[Any, Any, int, int]:
    """Result, state before, bytes that it takes (including what it removes), and size of the largest file."""
    prepare(writer, world, disk)
    state, start = writer.state(disk), free(disk)
    lowest = start
    code, error = command(writer.words(world, disk))
    assert code == 0, (writer.words(world, disk), error)
    lowest = min(lowest, free(disk))
    files = [path.stat().st_size for path in disk.rglob("*") if path.is_file()]
    return writer.result(disk), state, start - lowest, max(files)


def attempt(writer: Writer, world: Path, disk: Path, at: int, *, full: bool, result: Any, state: Any) -> str:
    prepare(writer, world, disk)
    words = writer.words(world, disk)
    # The check of the free space before a work would always be met first.
    unchecked = mock.patch("shutil.disk_usage", return_value=mock.Mock(free=2**60))
    try:
        with filled(disk, at) if full else files_up_to(at), unchecked:
            code, error = command(words)
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-6:]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(place))
        return f"FAILED: {type(error).__name__}: {str(error)[:200]!r} at {where}"
    if code == 0:
        if writer.result(disk) != result:
            return "FAILED: another result, and exit code 0"
        return "had enough"
    lines = error.strip().splitlines()
    sentence = lines[-1] if lines else ""
    if code != 2 or not sentence.startswith("saebench: ") or "Traceback" in error:
        return f"FAILED: exit code {code}: {error[-300:]!r}"
    if one_line(sentence) != sentence or not any(
        word in sentence for word in ("space", "too large", "full", "disk")
    ):
        return f"FAILED: the sentence does not name the full disk: {sentence[:300]!r}"
    if ("--resume" in sentence) != ("--resume" in writer.again):
        return f"FAILED: the sentence names another way to go on: {sentence[:300]!r}"
    try:
        with quiet():
            if writer.state(disk) != state:
                return "FAILED: what was there before has changed"
        code, error = command([*words, *writer.again])
        if code != 0:
            return f"FAILED: again with space, exit code {code}: {error[-300:]!r}"
        with quiet():
            equal = writer.result(disk) == result
    except BaseException as error:
        return f"FAILED: afterwards {type(error).__name__}: {str(error)[:200]!r}"
    if left := [path.name for path in disk.rglob("*.partial*")]:
        return f"FAILED: {left[0]} is left"
    return "refused with a sentence, then done" if equal else "FAILED: another result after it"


def prepare(writer: Writer, world: Path, disk: Path) -> None:
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in writer.before:
        shutil.copytree(world / name, disk / name)


def command(words: list[str]) -> tuple[int, str]:
    """Exit code and standard error of a command in this process."""
    from saebench.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return code, err.getvalue()


@contextlib.contextmanager
def disk_at(place: Path) -> Iterator[tuple[Path, bool]]:
    """A small disk of its own; an ordinary folder where nothing may be mounted."""
    place.mkdir()
    options = f"size={SIZE}"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(place)], capture_output=True)
    try:
        yield place, mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "--lazy", str(place)], check=False)


def free(disk: Path) -> int:
    status = os.statvfs(disk)
    return status.f_bavail * status.f_frsize


@contextlib.contextmanager
def filled(disk: Path, left: int) -> Iterator[None]:
    """Fill the disk until about ``left`` bytes are free."""
    filler = disk.parent / "disk" / ".filler"
    with open(filler, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free(disk) - left - MARGIN))
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Let no file grow beyond ``size`` bytes."""
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


# What is written --------------------------------------------------------------------------------------


def cache_hash(disk: Path) -> str:
    import saebench as sb

    cache = sb.open_cache(disk / "made")
    cache.verify()
    return cache.hash


def weights_of(name: str) -> Callable[[Path], Any]:
    def read(disk: Path) -> Any:
        import saebench as sb

        return float(sb.load(disk / name).W_dec.detach().double().sum())

    return read


def evaluation(disk: Path) -> Any:
    from saebench.runs.run import Run

    report = Run(disk / "run").evaluation() or {}
    return {name: report.get(name) for name in ("l0", "fvu", "n_tokens")}


def features(disk: Path) -> Any:
    import saebench as sb

    found = {}
    for name in store_names(disk):
        with contextlib.closing(sb.open_store(disk / "store", name)) as store:
            found[name] = store.features(["feature", "density"]).to_dict(), store.has("explanation")
    return found


def store_names(disk: Path) -> list[str]:
    from saebench.store.publish import read_manifest

    return [sae.name for sae in read_manifest(disk / "store").saes]


def first_features(disk: Path) -> Any:
    return features(disk)["small"][0]


def content(name: str) -> Callable[[Path], Any]:
    """Names and checksums of the files of a folder; of databases and pages the names alone."""

    def read(disk: Path) -> Any:
        files = sorted(path for path in (disk / name).rglob("*") if path.is_file())
        return [(path.name, sha256_file(path) if path.suffix == ".safetensors" else "") for path in files]

    return read


def small_training(world: Path, out: Path) -> list[str]:
    return [
        "train", "--cache", str(world / "cache"), "--out", str(out), "--d-sae", "48", "--k", "4", "--tokens",
        "640", "--batch-size", "64", "--log-every", "1", "--checkpoint-every", "4", "--device", "cpu",
        "--quiet",
    ]  # fmt: skip


def exporting(form: str) -> Writer:
    return Writer(
        lambda world, disk: [
            "store", "export", str(world / "store"), "--format", form, "--out", str(disk / "made")
        ],
        content("made"),
    )  # fmt: skip


WRITERS = {
    "harvest": Writer(
        lambda world, disk: [
            "harvest", "--model", str(world / "model"), "--text", str(world / "text" / "rows.jsonl"),
            "--site", "blocks.1.hook_resid_post", "--tokens", "1500", "--ctx", "32", "--dtype", "fp32",
            "--shard-rows", "32768", "--out", str(disk / "made"), "--device", "cpu", "--quiet",
        ],
        cache_hash,
    ),
    "cache import": Writer(
        lambda world, disk: [
            "cache", "import", str(world / "array.npy"), "--out", str(disk / "made"), "--shard-rows", "32768",
            "--quiet",
        ],
        cache_hash,
    ),
    "train": Writer(
        lambda world, disk: small_training(world, disk / "made"), weights_of("made"), again=("--resume",)
    ),
    "eval": Writer(
        lambda world, disk: [
            "eval", str(disk / "run"), "--cache", str(world / "cache"), "--rows", "all", "--tokens", "200",
            "--device", "cpu", "--quiet",
        ],
        evaluation, before=("run",), state=weights_of("run"),
    ),
    "index": Writer(
        lambda world, disk: [
            "index", str(world / "run"), "--cache", str(world / "cache"), "--out", str(disk / "store"),
            "--device", "cpu", "--quiet",
        ],
        features, before=("store",), state=first_features,
    ),
    "explain": Writer(
        lambda world, disk: ["explain", str(disk / "store"), "--provider", "rules", "--quiet"],
        features, before=("store",), state=first_features,
    ),
    "export": Writer(
        lambda world, disk: ["export", str(world / "run"), "--out", str(disk / "made")], content("made")
    ),
    "import": Writer(
        lambda world, disk: ["import", str(world / "saelens"), "--out", str(disk / "made")],
        weights_of("made"),
    ),
    "compare": Writer(
        lambda world, disk: ["compare", str(world / "run"), "--out", str(disk / "made")], content("made")
    ),
    **{f"store export {form}": exporting(form) for form in ("parquet", "html", "delphi", "neuronpedia")},
}  # fmt: skip
