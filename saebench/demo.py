"""``demo``: the whole pipeline on a small scale, from a model and a text to a feature store."""

from __future__ import annotations

import contextlib
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import saebench
from saebench.activations.settings import DEMO_HOOK, HarvestConfig
from saebench.core.bounds import AtLeast, Seed
from saebench.core.errors import UserError
from saebench.core.files import directory_lock, write_json_atomic
from saebench.core.reading import read_json
from saebench.core.settings import Settings, accepts_settings, to_flat
from saebench.evaluation.settings import EvalConfig
from saebench.saes.registry import architecture
from saebench.saes.spec import SaeSpec
from saebench.store.settings import IndexConfig
from saebench.training.settings import TrainConfig

if TYPE_CHECKING:
    from saebench.evaluation.compare import Comparison
    from saebench.store.query import FeatureStore
    from saebench.training.grid import Plan

PROGRESS_FILE = "demo.json"
STAGES = ("harvest", "train", "eval", "index")
HOOKS = {"demo": DEMO_HOOK, "smollm2": "blocks.8.hook_resid_post"}
MAIN_ARCHITECTURES = ("topk", "gradient", "mutual-choice", "feature-choice", "matching-pursuit")
TOKENS = 3_200_000
TOKENS_OF_ALL = 1_600_000
STEPS_BETWEEN_CHECKPOINTS = 200
SHOWN_FEATURES = 5
SHOWN_TOKENS = 6
SHOWCASE: dict[str, tuple[float | None, float | None]] = {"density": (2e-4, 5e-3), "entropy_tok": (3.0, 5.0)}
"""Ranges of the features to show first: neither rare nor dense, and active on several tokens."""
_MAY_CHANGE = {"out", "explore", "port", "device", "quiet"}


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Settings):
    """Run the whole pipeline on a small scale: harvest, train, eval, index; then show some features."""

    all: bool = False
    """Train all main architectures on the same rows, in one pass, and compare them."""
    out: Path = Path("demo")
    """Directory for the cache, the run and the feature store; run the command again to resume it."""
    model: str = "demo"
    """'demo', 'smollm2', a local Hugging Face folder, or a hub name."""
    text: str = "sotu"
    """'sotu'; a local file (.txt, .jsonl, .json, .parquet or .csv, also with .gz or .zst); a folder
    (one document per file, a data set, or one written by save_to_disk); or the hub name of a data set."""
    hook: str | None = None
    """Hook where activations are read; by default the residual stream in the middle of the model."""
    harvest_tokens: Annotated[int, AtLeast(1)] = 600_000
    """Rows to harvest; fewer if the text ends first."""
    ctx: Annotated[int, AtLeast(2)] = 128
    """Tokens in a context."""
    d_sae: int = 2048
    """Number of latents."""
    k: int = 32
    """Active latents per token."""
    tokens: Annotated[int | None, AtLeast(1)] = None
    """Rows to train on; by default 3,200,000, and half of that with --all."""
    batch_size: Annotated[int, AtLeast(1)] = 4096
    """Rows in a training step."""
    eval_tokens: Annotated[int, AtLeast(2)] = 30_000
    """Held-out rows to measure on, at most."""
    seed: Seed = 0
    """Seeds the initial weights and the order of the rows."""
    explore: bool = False
    """Open the explorer at the end."""
    port: int = 8501
    """Port of the explorer."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda' or 'cuda:1'."""
    quiet: bool = False
    """No progress display."""

    def __post_init__(self) -> None:
        super().__post_init__()
        SaeSpec(d_sae=self.d_sae, k=self.k)


@dataclass(frozen=True)
class ShownFeature:
    """One feature in the printed summary."""

    feature: int
    density: float
    tokens: list[str]
    """Tokens on which the feature fires most often."""
    example: str
    """Text around the largest activation; the token is in [brackets]."""


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """The paths that a demo wrote, and the evaluation of its SAEs."""

    cache: Path
    runs: tuple[Path, ...]
    store: Path
    evaluation: dict[str, Any]
    """The contents of eval.json of the first run."""
    comparison: Comparison | None
    """Comparison of all runs, if there are several."""
    seconds: dict[str, float]
    """Wall-clock time of each stage in the call that finished it."""
    peak_memory_bytes: int
    """Largest resident memory of the process, mapped files included."""
    features: list[ShownFeature]


@accepts_settings(DemoConfig)
def demo(config: DemoConfig) -> DemoReport:
    """Harvest, train, evaluate and index; write out/cache, out/runs/NAME and out/store.

    It trains a TopK SAE, or with ``all`` the five main architectures with equal tokens, width and k in one
    pass over a cache with gradients. Stages that an earlier call with the same settings finished are skipped,
    and an interrupted stage is resumed.

    Raises:
        UserError: ``out`` holds a demo with other settings, or a stage fails.
    """
    from saebench.runs.run import Run
    from saebench.saes.files import SPEC_FILE
    from saebench.training.loop import train_all

    cache, store = config.out / "cache", config.out / "store"
    names = MAIN_ARCHITECTURES if config.all else ("topk",)
    runs = tuple(config.out / "runs" / f"{name}-{config.d_sae}-k{config.k}" for name in names)
    named = dict(zip(names, runs, strict=True))
    _plans(config, cache, named)  # raises for invalid settings before anything is harvested
    with directory_lock(config.out, what="the demo"):
        done = _Progress(config)
        with done.stage("harvest", leaves=(cache / "manifest.json",)) as wanted:
            if wanted:
                _harvest(config, cache)
        with done.stage("train", leaves=[run / SPEC_FILE for run in runs]) as wanted:
            if wanted:
                train_all(_plans(config, cache, named))
        with done.stage("eval", leaves=[Run(run).eval_file() for run in runs]) as wanted:
            for run in runs if wanted else ():
                _evaluate(config, cache, run)
        with done.stage("index", leaves=(store / "manifest.json",)) as wanted:
            for run in runs if wanted else ():
                saebench.index(
                    IndexConfig(run=run, cache=cache, out=store, device=config.device, quiet=config.quiet)
                ).close()
    with saebench.open_store(store) as opened:
        features = showcase_features(opened)
    return DemoReport(
        cache=cache,
        runs=runs,
        store=store,
        evaluation=Run(runs[0]).evaluation() or {},
        comparison=saebench.compare(runs=runs) if config.all else None,
        seconds=done.seconds,
        peak_memory_bytes=done.peak_memory_bytes,
        features=features,
    )


def _harvest(config: DemoConfig, cache: Path) -> None:
    saebench.harvest(
        HarvestConfig(
            out=cache, model=(config.model,), text=config.text, hook=(_hook(config),), gradients=config.all,
            tokens=config.harvest_tokens, ctx=config.ctx, device=config.device, quiet=config.quiet,
        )
    )  # fmt: skip


def _plans(config: DemoConfig, cache: Path, runs: dict[str, Path]) -> list[Plan]:
    """Settings of each training.

    Raises:
        UserError: an architecture cannot be trained with these settings.
    """
    tokens = config.tokens if config.tokens is not None else TOKENS_OF_ALL if config.all else TOKENS
    plans: list[Plan] = [
        (
            TrainConfig(
                cache=cache, out=run, sae=name, tokens=tokens, batch_size=config.batch_size,
                seed=config.seed, checkpoint_every=STEPS_BETWEEN_CHECKPOINTS, resume=run.exists(),
                device=config.device, quiet=config.quiet,
            ),
            architecture(name).Spec(d_sae=config.d_sae, k=config.k),
        )
        for name, run in runs.items()
    ]  # fmt: skip
    for _, spec in plans:
        spec.check(batch_size=config.batch_size, n_steps=tokens // config.batch_size)
    return plans


def _evaluate(config: DemoConfig, cache: Path, run: Path) -> None:
    """Evaluate the run in each inference mode of its SAE."""
    for inference in saebench.load(run).inferences or (None,):
        saebench.evaluate(
            EvalConfig(
                run=run, cache=cache, model="cache", inference=inference, tokens=config.eval_tokens,
                device=config.device, quiet=config.quiet,
            )
        )  # fmt: skip


class _Progress:
    """``demo.json``: the settings of the demo, and the time of each finished stage."""

    def __init__(self, config: DemoConfig) -> None:
        self._path = config.out / PROGRESS_FILE
        self._quiet = config.quiet
        self._settings = {n: v for n, v in to_flat(config).items() if n not in _MAY_CHANGE}
        self.seconds: dict[str, float] = {}
        self.peak_memory_bytes = 0
        if self._path.exists():
            self._take_over(_read_progress(self._path), config.out)
        self._write()

    @contextlib.contextmanager
    def stage(self, name: str, *, leaves: Sequence[Path]) -> Iterator[bool]:
        """Yield whether the stage must run; if so, record its time."""
        if name in self.seconds and all(file.exists() for file in leaves):
            if not self._quiet:
                print(f"{name}: already done, in {leaves[0].parent}", file=sys.stderr, flush=True)
            yield False
            return
        started = time.monotonic()
        yield True
        self.seconds[name] = round(time.monotonic() - started, 2)
        self.peak_memory_bytes = max(self.peak_memory_bytes, _peak_memory_bytes())
        self._write()

    def _take_over(self, written: dict[str, Any], out: Path) -> None:
        for name, value in self._settings.items():
            before = written.get("settings", {}).get(name)
            if before != value:
                flag = "--" + name.replace("_", "-")
                raise UserError(
                    f"{out} holds a demo with {flag} {before}, but this call has {value}; "
                    "choose another --out"
                )
        self.seconds = {stage: written["seconds"][stage] for stage in STAGES if stage in written["seconds"]}
        self.peak_memory_bytes = int(written["peak_memory_bytes"])

    def _write(self) -> None:
        value = {
            "settings": self._settings,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }
        write_json_atomic(self._path, value)


def _read_progress(path: Path) -> dict[str, Any]:
    from saebench.core.shapes import Count, Number, Shape

    class Progress(Shape):
        settings: dict[str, Any]
        seconds: dict[str, Number]
        peak_memory_bytes: Count

    way_out = "delete it, and the demo runs again"
    found: dict[str, Any] = read_json(path, what="the record of the demo", shape=Progress, way_out=way_out)
    return found


def showcase_features(store: FeatureStore, n: int = SHOWN_FEATURES) -> list[ShownFeature]:
    """The ``n`` densest features within the ranges of ``SHOWCASE``, with the tokens that they fire on.

    If the store has too few of these, the densest other features are added.
    """
    chosen: dict[int, float] = {}
    for ranges in (SHOWCASE, {}):
        found = store.features(
            ["feature", "density"],
            ranges=ranges,
            flags={"dead": False},
            order_by="density",
            descending=True,
            limit=n,
        )
        for feature, density in found.itertuples(index=False):
            if len(chosen) < n:
                chosen.setdefault(int(feature), float(density))
    return [_shown(store, feature, density) for feature, density in chosen.items()]


def _shown(store: FeatureStore, feature: int, density: float) -> ShownFeature:
    tokens = list(store.tokens(feature)["text"][:SHOWN_TOKENS]) if store.has("feature_token") else []
    examples = store.examples(feature, "top")
    example = ""
    if len(examples) and examples["pieces"][0]:
        first = examples.iloc[0]
        example = _snippet(first["pieces"], int(first["pos"]) - int(first["start"]))
    return ShownFeature(feature, density, tokens, example)


def _snippet(pieces: list[str], at: int, around: int = 8) -> str:
    """The text of a window near position ``at``, on one line, with that token in brackets."""
    shown = [f"[{piece}]" if i == at else piece for i, piece in enumerate(pieces)]
    return " ".join("".join(shown[max(0, at - around) : at + around + 1]).split())


def _hook(config: DemoConfig) -> str:
    if config.hook is not None:
        return config.hook
    if config.model in HOOKS:
        return HOOKS[config.model]
    from saebench.sources.models import peek_model

    return f"blocks.{peek_model(config.model).n_layers // 2}.hook_resid_post"


def _peak_memory_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def program() -> str:
    """The command that runs this program: 'saebench', or its path if it is not on the PATH."""
    called = sys.argv[0]
    return called if Path(called).name == "saebench" and not shutil.which("saebench") else "saebench"
