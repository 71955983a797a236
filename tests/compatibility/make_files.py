"""Makes the archive of small caches, runs and stores that later versions must open and answer as before.

    python tests/compatibility/make_files.py files-0.1.tar.xz    # with the environment of that version

What they answered when they were made is in ``commands/`` and ``answers/`` of the archive (see scenario.py)
and in ``codes.safetensors``. Everything is small: at most 2 MB packed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import scenario
import torch
from scenario import ARCHITECTURES, Scenario, ask_about_annotations, ask_about_store, describe_cache

HOOK = "blocks.2.hook_resid_post"
TRAINING = "--d-sae 24 --k 3 --tokens 15360 --batch-size 256 --log-every 10 --checkpoint-every 10"
FEATURES = (0, 5, 11)
ROWS = 40
"""Rows of a cache whose codes are recorded."""
UNFINISHED = ("topk", "jumprelu")
"""Architectures with a run that was stopped; the one in runs/ has the same settings and was not."""


def make(folder: Path) -> None:
    """Fill the empty directory ``folder``."""
    with contextlib.chdir(folder):
        steps = Scenario(lambda line: print(line, file=sys.stderr, flush=True))
        caches(steps)
        runs(steps)
        for sae in UNFINISHED:
            stop_early(sae)
        stores(steps)
        record(steps)
        failed = [
            name.stem for name in Path("commands").iterdir() if json.loads(name.read_text())["exit_code"]
        ]
        if failed:
            sys.exit(f"these commands failed: {', '.join(failed)}")
        for leftover in ("inputs", "cache-sotu"):
            shutil.rmtree(leftover)
        for lock in folder.rglob(".lock"):
            lock.unlink()


def caches(steps: Scenario) -> None:
    steps.run("harvest-sotu", f"harvest --hook {HOOK} --tokens 1000 --ctx 64 --out cache-sotu")
    scenario.write_documents(steps.sb.open_cache("cache-sotu"), Path("inputs/documents.jsonl"), n=128)
    steps.run("harvest", "harvest --text inputs/documents.jsonl --ctx 32 --tokens 1e6 --out cache")
    scenario.write_rows(1500, Path("inputs"))
    arrays = "inputs/rows.npy --gradients inputs/gradients.npy"
    steps.run("cache-import", f"cache import {arrays} --hook layer.7 --dtype bf16 --out cache-array")


def runs(steps: Scenario) -> None:
    """One of every architecture on rows of 24 dimensions, and two on activations of the model."""
    for sae, flags in ARCHITECTURES.items():
        steps.run(
            f"train-{sae}", f"train --cache cache-array --sae {sae} {TRAINING} {flags} --out runs/{sae}"
        )
        steps.run(f"eval-{sae}", f"eval runs/{sae}")
    for sae in ("topk", "mutual-choice"):
        steps.run(f"train-model-{sae}", f"train --cache cache --sae {sae} {TRAINING} --out model-runs/{sae}")
        steps.run(f"eval-model-{sae}", f"eval model-runs/{sae} --model cache")
        shutil.rmtree(f"model-runs/{sae}/checkpoints")
    steps.run("compare", "compare " + " ".join(f"runs/{sae}" for sae in ARCHITECTURES))


def stop_early(sae: str) -> None:
    """Leave unfinished/SAE as a training that got SIGTERM after its first checkpoint."""
    out, script = Path(f"unfinished/{sae}"), shutil.which("saebench", path=os.path.dirname(sys.executable))
    words = f"train --cache cache-array --sae {sae} {TRAINING} {ARCHITECTURES[sae]} --out {out}"
    for _ in range(20):
        shutil.rmtree(out, ignore_errors=True)
        with subprocess.Popen([str(script), *words.split()], stderr=subprocess.DEVNULL) as training:
            while training.poll() is None and not list(out.glob("checkpoints/step-*")):
                time.sleep(0.001)
            training.send_signal(signal.SIGTERM)
        if not (out / "sae.json").exists():
            return
    sys.exit(f"{words} was never stopped before it had finished; give it more steps")


def stores(steps: Scenario) -> None:
    settings = "--cache cache --with-context-index --examples 4 --window 12"
    steps.run("index", f"index model-runs/topk model-runs/mutual-choice {settings} --out store")
    steps.run("effects", "effects store --run model-runs/topk --contexts 1 --sample 3 --rows all")
    steps.run("explain", "explain store --provider rules")
    with steps.sb.open_store("store") as store:
        scenario.annotate(store.annotations)
    steps.run("store-info", "store info store")
    steps.run("store-check", "store check store --run model-runs/topk --cache cache")


def record(steps: Scenario) -> None:
    """Ask the files everything that is compared later."""
    from safetensors.torch import save_file

    sb = steps.sb
    with steps.answers("caches", sb) as answers:
        for name in ("cache", "cache-array"):
            answers.keep(name, lambda name=name: describe_cache(sb.open_cache(name)))
    for sae in sb.open_store("store").saes:
        with sb.open_store("store", sae) as store, steps.answers(f"store-{sae}", store) as answers:
            ask_about_store(answers, FEATURES)
    with sb.open_store("store") as store, steps.answers("annotations", store.annotations) as answers:
        ask_about_annotations(answers, "interesting")
    with steps.answers("prompts", sb) as answers:
        answers.ask("features_of", scenario.PROMPT, "model-runs/topk")
    runs = sorted(path.parent for path in Path().glob("*runs/*/sae.json"))
    save_file({str(run): codes_of(run) for run in runs}, "codes.safetensors")
    scenario.write_json(Path("settings.json"), {"training": TRAINING, "features": FEATURES})


def codes_of(run: Path) -> torch.Tensor:
    """The codes [ROWS, d_sae] of the first rows of the cache that a run was trained on."""
    import saebench as sb

    cache = sb.open_cache("cache-array" if run.parent.name == "runs" else "cache")
    return sb.load(run).encode(cache.activations()[:ROWS].float()).to_dense()


def main() -> None:
    archive = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        make(folder)
        with tarfile.open(archive, "w:xz", preset=9) as packed:
            for path in sorted(folder.rglob("*")):
                packed.add(path, path.relative_to(folder).as_posix(), recursive=False, filter=nobody)
    print(f"{archive.stat().st_size:,} bytes")


def nobody(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """A file of an archive without the name of who made it."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    main()
