"""The feature store benchmark: build time, size and query times."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import saebench
from saebench.bench.cpu import processor
from saebench.bench.settings import BenchConfig
from saebench.bench.store_world import VOCAB, MadeUpCache, made_up_codes, made_up_sae
from saebench.core.settings import to_flat
from saebench.store import publish, schema
from saebench.store.build import IndexJob, Options, write_sae
from saebench.store.corpus import Corpus
from saebench.store.database import insert, insert_meta, new_database
from saebench.store.query import FeatureStore, open_store
from saebench.store.sorted_spill import RUN_SIZE, SortedSpill
from saebench.store.tables import TableTimer
from saebench.store.textfile import write_text_file

GIB = 2**30
FIRST_TABLES = ("read", "act", "feature", "hist", "example")
"""The tables that a page needs, and reading the activations that they are made from."""
ASKED = 200
"""Number of random features and tokens to query; the first tenth of the answers is a warm-up."""
LARGE = 1_000_000
"""Number of features in the table that is filtered and sorted."""
SHOWN = (
    "feature", "top_token", "top_token_share", "logit_top", "density", "max_act", "mean_act", "p50", "p99",
    "n_act", "n_ctx_act", "n_doc_act", "entropy_tok", "enc_dec_cos", "dec_max_cos", "dec_nn",
)  # fmt: skip
"""The columns that the explorer shows."""
BILLION = 1_000_000_000
SETTINGS = ("store_activations", "store_features", "k", "d_in", "threads")
N_PARTS = 6


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A number with its unit, and the goal that it should not exceed."""

    name: str
    value: float
    unit: str
    goal: float | None = None

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.value <= self.goal


@dataclass(frozen=True, kw_only=True)
class StoreReport:
    """The measurements, and numbers extrapolated from them with the reasoning."""

    device: str
    versions: dict[str, str]
    settings: dict[str, Any]
    seconds: dict[str, float]
    cpu_seconds: dict[str, float]
    bytes_per_activation: dict[str, float]
    measured: list[Measured]
    extrapolated: list[Measured]
    reasoning: str

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        data = dataclasses.asdict(self)
        for name in ("measured", "extrapolated"):
            for shown, one in zip(data[name], getattr(self, name), strict=True):
                shown["met"] = one.met
        return data


def measure(config: BenchConfig, announce: Callable[[str], None]) -> StoreReport:
    """Build a store of synthetic codes in a temporary directory, and time the queries of the pages.

    Encoding with an SAE is not measured; writing its codes as runs is. The goals are for 60 million
    activations of 16,384 latents on two cores.
    """
    import duckdb
    import pyarrow

    torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory(prefix="saebench-store-") as folder:
        store = Path(folder) / "store"
        with peak_memory() as peak:
            timer, n_activations, n_tokens = build(store, config, announce)
        seconds = timer.seconds
        sizes = bytes_of_tables(store)
        announce("answers")
        answers = _answers(store)
        shutil.rmtree(store)
        announce("a large table")
        answers += _large_table(Path(folder) / "large")
    first = sum(seconds[name] for name in FIRST_TABLES)
    after = sum(seconds.values()) - seconds["runs"]
    first_cpu = sum(timer.cpu_seconds[name] for name in FIRST_TABLES)
    after_cpu = sum(timer.cpu_seconds.values()) - timer.cpu_seconds["runs"]
    own = {name: size / n_activations for name, size in sizes.items()}
    rest = sum(size for name, size in own.items() if name not in ("context", "act_by_ctx"))
    measured = [
        Measured(name=f"{', '.join(FIRST_TABLES)} built", value=first, unit="s", goal=90),
        Measured(name=f"{', '.join(FIRST_TABLES)} built, CPU time", value=first_cpu, unit="s"),
        Measured(name="all tables built", value=after, unit="s", goal=300),
        Measured(name="all tables built, CPU time", value=after_cpu, unit="s"),
        Measured(name="act", value=own["act"], unit="bytes per activation", goal=8),
        Measured(name="all but contexts", value=rest, unit="bytes per activation", goal=16),
        *answers,
        Measured(name="peak anonymous memory", value=peak.gib, unit="GiB", goal=3),
    ]
    extrapolated, reasoning = extrapolate(config, seconds, own, n_activations, n_tokens, peak.gib)
    return StoreReport(
        device=f"{processor()}, {config.threads} threads",
        versions={
            "saebench": saebench.__version__, "duckdb": duckdb.__version__, "numpy": np.__version__,
            "pyarrow": pyarrow.__version__, "torch": torch.__version__,
        },
        settings={name: to_flat(config)[name] for name in SETTINGS} | {"tokens": n_tokens},
        seconds=seconds, cpu_seconds=timer.cpu_seconds, bytes_per_activation=own, measured=measured,
        extrapolated=extrapolated, reasoning=reasoning,
    )  # fmt: skip


def build(store: Path, config: BenchConfig, announce: Callable[[str], None]) -> tuple[TableTimer, int, int]:
    """Build a store at ``store``; returns ``(timer, activations, tokens)``."""
    timer, n_latents = TableTimer(), config.store_features
    announce("text")
    cache: Any = MadeUpCache(config.store_activations // config.k, config.d_in)
    corpus = Corpus(cache)
    store.mkdir()
    current, building = publish.begin(store)
    runs = SortedSpill(store / "runs", n_latents)
    announce("codes")
    for batch in made_up_codes(cache, n_latents, config.k):
        with timer.on("runs"):
            runs.add(*batch)
            if runs.n_waiting >= RUN_SIZE:
                runs.flush()
    with timer.on("runs"):
        runs.flush()
    announce("text file")
    with timer.on("context, token, document"):
        text_file = building / f"text-{corpus.hash[:12]}.duckdb"
        write_text_file(text_file, corpus, name="made-up")
    announce("tables")
    W_U_DV = torch.randn(config.d_in, VOCAB, generator=torch.Generator().manual_seed(2))
    job = IndexJob(
        sae=made_up_sae(config.d_in, n_latents, config.k),
        options=Options(name="made-up", hook="made-up", quiet=True), W_U_DV=W_U_DV,
    )  # fmt: skip
    stored = write_sae(building, job, "0" * 64, cache, corpus, runs, timer)
    publish.publish(store, current, [stored], publish.describe(text_file))
    shutil.rmtree(store / "runs")
    return timer, runs.n_activations, corpus.n_rows


def bytes_of_tables(store: Path) -> dict[str, int]:
    """Bytes on disk of each table: the blocks with its columns; a block counts once per table."""
    manifest = publish.read_manifest(store)
    sizes: dict[str, int] = {}
    import duckdb

    for file in manifest.files():
        with duckdb.connect(str(store / file.path), read_only=True) as connection:
            block = connection.execute("PRAGMA database_size").fetchall()[0][2]
            rows = connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()
            for (name,) in rows:
                query = (
                    "SELECT count(DISTINCT b) FROM (SELECT block_id AS b FROM pragma_storage_info(?) WHERE "
                    "block_id >= 0 UNION ALL SELECT unnest(additional_block_ids) FROM pragma_storage_info(?))"
                )
                n_blocks = connection.execute(query, [name, name]).fetchall()[0][0]
                sizes[name] = sizes.get(name, 0) + n_blocks * int(block)
    return sizes


def extrapolate(
    config: BenchConfig, seconds: dict[str, float], own: dict[str, float], n_activations: int, n_tokens: int,
    peak_gib: float,
) -> tuple[list[Measured], str]:  # fmt: skip
    """Extrapolate time, disk and memory to a billion activations with the same number of latents."""
    times = BILLION / n_activations
    per_latent = ("neighbor", "neighbor (directions)", "logit", "quantile", "token_feature")
    fixed = sum(seconds.get(name, 0) for name in per_latent)
    growing = sum(seconds.values()) - seconds["runs"] - fixed
    disk = (own["act"] + own.get("context", 0)) * BILLION
    disk += sum(size for name, size in own.items() if name not in ("act", "context")) * n_activations
    rows = n_tokens * times * 4 / GIB
    reasoning = (
        "Tables are made from groups of at most 4,000,000 activations (or of one latent). Each group is "
        "read, sorted and written separately. So time grows with the number of groups. Memory grows with "
        "the densest latent (at most one activation per token) and a few arrays of 4 bytes per token, not "
        f"with the number of activations. Times per latent do not change: {', '.join(per_latent)} "
        "(co-firing reads a bounded number of pairs). On disk, act and contexts grow; examples, token lists "
        "and other tables have a fixed number of rows per latent."
    )
    return [
        Measured(name="all tables built", value=fixed + growing * times, unit="s"),
        Measured(name="store on disk", value=disk / GIB, unit="GiB"),
        Measured(name="peak anonymous memory", value=peak_gib + rows * (1 - 1 / times), unit="GiB", goal=3),
    ], reasoning


@dataclass
class Peak:
    """Peak memory in GiB."""

    gib: float = 0.0


@contextlib.contextmanager
def peak_memory() -> Iterator[Peak]:
    """Peak anonymous memory (without mapped files) of this process, sampled ten times per second."""
    peak, done = Peak(), threading.Event()

    def sample() -> None:
        while not done.wait(0.1):
            peak.gib = max(peak.gib, anonymous_bytes() / GIB)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak.gib = max(peak.gib, anonymous_bytes() / GIB)


def anonymous_bytes() -> int:
    """RssAnon of this process; 0 if the system does not report it."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if "RssAnon" in line), 0)


def _answers(path: Path) -> list[Measured]:
    """Times of the queries of pages, on a warm store."""
    rng = np.random.default_rng(5)
    with open_store(path) as store:
        alive = store.features(["feature"], flags={"dead": False})["feature"].to_numpy()
        features = rng.choice(alive, ASKED)
        tokens = rng.integers(0, VOCAB, ASKED)

        def page(feature: int) -> None:
            store.feature(feature)
            store.histogram(feature)
            store.tokens(feature)
            store.examples(feature, "top")
            store.logits(feature)
            store.neighbors(feature)

        return [
            *_waits("a feature page's data", page, features, 15),
            *_waits("all activations of a feature", store.activations, features, 50),
            *_waits("top features of a token", store.features_on, tokens, 15),
        ]


def _large_table(path: Path) -> list[Measured]:
    """Times of queries for the first rows of a large feature table, filtered and sorted."""
    rng = np.random.default_rng(6)
    with _store_of_features(path, LARGE) as store:

        def first_rows(number: int, columns: Sequence[str] | None = None) -> None:
            by = ("max_act", "density", "entropy_tok", "dec_max_cos", "skew")[number % 5]
            bounds: dict[str, Any] = {"n_act": (float(rng.integers(0, 500)), None)}
            store.features(
                columns, ranges=bounds, flags={"dead": False}, order_by=by, descending=True, limit=1000
            )

        def shown_rows(number: int) -> None:
            first_rows(number, SHOWN)

        name = "first 1,000 of 1,000,000 features"
        return [
            *_waits(f"{name} ({len(SHOWN)} columns)", shown_rows, range(40), 50),
            *_waits(f"{name} (all columns)", first_rows, range(40), 50),
        ]


def _store_of_features(path: Path, n: int) -> FeatureStore:
    """A store with a large feature table and no other tables."""
    rng = np.random.default_rng(7)
    path.mkdir()
    current, building = publish.begin(path)
    file = building / "sae-large.duckdb"
    with new_database(file, [schema.SAE_META, schema.FEATURE]) as connection:
        columns: dict[str, Any] = {}
        for column in schema.FEATURE.columns:
            if column.type == "VARCHAR":
                columns[column.name] = [f" token{number}" for number in rng.integers(0, VOCAB, n)]
            elif column.type == "BOOLEAN":
                columns[column.name] = rng.random(n) < 0.05
            elif column.type in ("BIGINT", "UINTEGER"):
                columns[column.name] = rng.integers(0, 1000, n)
            else:
                columns[column.name] = rng.lognormal(size=n).astype(np.float32)
        columns["feature"] = np.arange(n)
        insert(connection, schema.FEATURE, columns)
        insert_meta(connection, schema.SAE_META, {
            "format_version": schema.FORMAT_VERSION, "d_sae": n, "missing": {}, "left_out": {},
        })  # fmt: skip
    stored = publish.StoredSae(name="large", file=publish.describe(file), text=None)
    publish.publish(path, current, [stored], None)
    return open_store(path)


def _waits(name: str, ask: Callable[[int], Any], what: Any, goal: float) -> list[Measured]:
    """Median and 95% quantile of the milliseconds per query."""
    seconds = []
    for one in what:
        start, cpu_start = time.perf_counter(), time.process_time()
        ask(int(one))
        seconds.append((time.perf_counter() - start, time.process_time() - cpu_start))
    wall, cpu = 1e3 * np.array(seconds[len(seconds) // 10 :]).T
    return [
        Measured(name=f"{name}, median", value=float(np.median(wall)), unit="ms"),
        Measured(name=f"{name}, 95%", value=float(np.quantile(wall, 0.95)), unit="ms", goal=goal),
        Measured(name=f"{name}, 95%, CPU time", value=float(np.quantile(cpu, 0.95)), unit="ms"),
    ]
