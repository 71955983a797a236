"""Writes all tables of one SAE in one pass over its activations, latent by latent.

Tables that derive from the activations and the text are computed here, in the same way for activations of an
encoding and for those of the act table of an older file. Directions, logits and the run's metrics are
``StaticData``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from saebench.core.progress import progress
from saebench.core.reading import read_bytes
from saebench.runs.metrics_log import metrics_of
from saebench.store import schema
from saebench.store.coactivation import CoactivationCounter
from saebench.store.corpus import Corpus
from saebench.store.database import insert, insert_meta, new_database
from saebench.store.examples import examples
from saebench.store.geometry import directions, nearest_rows, neighbor_rows
from saebench.store.logits import logit_rows
from saebench.store.sites import comparable_rows, written_part
from saebench.store.sorted_spill import Activations, SortedSpill
from saebench.store.statistics import (
    activation_statistics,
    histograms,
    list_column,
    position_rows,
    quantile_rows,
)
from saebench.store.text import token_text
from saebench.store.tokens import TokenFeatures, label_rows, token_statistics

if TYPE_CHECKING:
    import duckdb

    from saebench.runs.metrics_log import metrics_of
from saebench.saes.base import SAE

ItemT = TypeVar("ItemT")

GROUP_SIZE = 4_000_000
"""Activations per group that is processed at once; bounds memory at about 200 bytes per activation."""

GROUP_LATENTS = 1024
"""Latents per group that is processed at once; bounds the examples in memory."""

NEED_TEXT = (
    "context",
    "token",
    "document",
    "feature_token",
    "token_feature",
    "feature_label",
    "position",
)
STATIC_COLUMNS = (
    "dec_norm",
    "enc_norm",
    "enc_dec_cos",
    "b_enc",
    "dec_max_cos",
    "dec_nn",
    "logit_top",
    "logit_max",
    "logit_kurtosis",
)
"""Columns of the feature table that do not derive from activations."""


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """How many examples of each group, how wide their windows, and how they are drawn."""

    examples: int = 20
    window: int = 32
    seed: int = 0
    quiet: bool = False


@dataclass(frozen=True)
class StaticData:
    """Data that does not derive from activations: columns of the feature table, and rows of whole tables."""

    columns: dict[str, Any]
    tables: list[tuple[schema.Table, dict[str, Any]]]


class TableTimer:
    """Wall-clock and CPU seconds spent on each table; other programs do not change the CPU seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def on(self, name: str) -> Iterator[None]:
        start, cpu_start = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + time.process_time() - cpu_start

    def each(self, name: str, items: Iterable[ItemT]) -> Iterator[ItemT]:
        """The items; the time to get them is added to ``name``."""
        iterator = iter(items)
        while True:
            with self.on(name):
                item = next(iterator, None)
            if item is None:
                return
            yield item


@dataclass(frozen=True, kw_only=True)
class Build:
    """The input of write_sae_file: the activations of one SAE, its text, its static data and options."""

    corpus: Corpus
    d_sae: int
    n_activations: int
    groups: Iterable[Activations]
    static: StaticData
    options: TableOptions
    context_index: Callable[[duckdb.DuckDBPyConnection], None] | None = None
    timer: TableTimer = field(default_factory=TableTimer)


def write_sae_file(path: Path, build: Build, meta: dict[str, Any]) -> None:
    """Write all tables of one SAE except those in ``meta["missing"]`` and ``meta["left_out"]``."""
    absent = meta["missing"] | meta["left_out"]
    tables = [table for name, table in schema.SAE_TABLES.items() if name not in absent]
    names = {table.name for table in tables}
    corpus, options, timer = build.corpus, build.options, build.timer
    together = CoactivationCounter(corpus.n_rows, build.d_sae, build.n_activations, options.seed)
    inverse = TokenFeatures()
    with (
        new_database(path, tables) as connection,
        progress("tables", total=build.n_activations, unit="act", quiet=options.quiet) as bar,
    ):
        for table, rows in build.static.tables:
            insert(connection, table, rows)
        for acts in timer.each("read", build.groups):
            with timer.on("act"):
                insert(connection, schema.ACT, _act_rows(acts, corpus))
            with timer.on("feature"):
                columns = activation_statistics(acts, corpus)
            if corpus.has_text:
                with timer.on("feature_token"):
                    rows, of_feature = token_statistics(acts, corpus, inverse)
                    insert(connection, schema.FEATURE_TOKEN, rows)
                    columns |= of_feature
            if "position" in names:
                with timer.on("position"):
                    insert(connection, schema.POSITION, position_rows(acts, corpus))
            if "feature_label" in names:
                with timer.on("feature_label"):
                    insert(connection, schema.FEATURE_LABEL, label_rows(acts, corpus))
            with timer.on("feature"):
                insert(connection, schema.FEATURE, _feature_rows(acts, columns, build.static))
            with timer.on("hist"):
                insert(connection, schema.HIST, histograms(acts))
            with timer.on("quantile"):
                insert(connection, schema.QUANTILE, quantile_rows(acts))
            with timer.on("example"):
                insert(
                    connection,
                    schema.EXAMPLE,
                    examples(acts, corpus, n=options.examples, window=options.window, seed=options.seed),
                )
            with timer.on("neighbor"):
                together.add(acts)
            bar.update(len(acts.row_S))
        with timer.on("neighbor"):
            insert(connection, schema.NEIGHBOR, together.rows())
        meta = {**meta, "pair_tokens": together.n_tokens}
        if corpus.has_text:
            with timer.on("token_feature"):
                insert(connection, schema.TOKEN_FEATURE, inverse.rows())
        if "position" in names:
            meta["position_rows"] = corpus.bucket_counts.tolist()
        if build.context_index:
            with timer.on("act_by_ctx"):
                build.context_index(connection)
        with timer.on("file"):
            insert_meta(connection, schema.SAE_META, meta)
            connection.execute("CHECKPOINT")


@torch.no_grad()
def static_data(
    sae: SAE,
    corpus: Corpus,
    W_U_DV: Tensor | None,
    metrics: Path | None,
    timer: TableTimer | None = None,
    *,
    logit_site: str | None = None,
    site_std: Sequence[float] | None = None,
) -> StaticData:
    """Data from the SAE's weights, the model's unembedding [width, V] and the run's metrics.jsonl.

    ``logit_site`` is the one of several targets that the unembedding reads; ``site_std`` has the standard
    deviation of each site of a crosscoder.
    """
    timer = timer or TableTimer()
    W_dec_MD, W_enc_MD = sae.W_dec.detach(), sae.W_enc.detach().T
    none = [None] * sae.d_sae
    columns: dict[str, Any] = dict.fromkeys(STATIC_COLUMNS, none)
    columns |= directions(W_enc_MD, W_dec_MD)
    columns["b_enc"] = sae.b_enc.detach().float().cpu().numpy()
    tables = []
    enc_MD, dec_MD = comparable_rows(sae, site_std)
    with timer.on("neighbor (directions)"):
        for kind, W_MD in (("decoder", dec_MD), ("encoder", enc_MD)):
            other_MJ, cosine_MJ = nearest_rows(W_MD)
            tables.append((schema.NEIGHBOR, neighbor_rows(kind, other_MJ, cosine_MJ)))
            if kind == "decoder" and other_MJ.shape[1]:
                columns["dec_max_cos"], columns["dec_nn"] = cosine_MJ[:, 0].numpy(), other_MJ[:, 0].numpy()
    if W_U_DV is not None:
        with timer.on("logit"):
            rows, of_feature = logit_rows(written_part(sae, logit_site), W_U_DV)
            tables.append((schema.LOGIT, rows))
            best = rows["token"].reshape(sae.d_sae, -1)[:, 0]
            columns |= of_feature
            columns["logit_top"] = [token_text(corpus.vocab[token]) for token in best]
    if metrics is not None:
        tables.append((schema.TRAIN_METRIC, metric_rows(metrics)))
    return StaticData(columns, tables)


def metric_rows(path: Path) -> dict[str, Any]:
    """Rows of train_metric from a run's metrics.jsonl: every number of every line except the step."""
    rows: list[tuple[int, str, float]] = []
    for line in read_bytes(path, what="the metrics").splitlines():
        values = metrics_of(line)
        if values is None:  # the last line of a run that is being written
            continue
        rows += [
            (values["step"], name, float(value))
            for name, value in values.items()
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        ]
    rows.sort()
    step, name, value = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    return {
        "step": np.array(step, dtype=np.int64),
        "name": np.array(name, dtype=object),
        "value": np.array(value, dtype=np.float64),
    }


def missing_tables(corpus: Corpus, no_logits: str | None) -> dict[str, str]:
    """Table -> why it cannot be computed; ``no_logits`` is the reason for logits, or None."""
    missing = {} if no_logits is None else {"logit": no_logits}
    if not corpus.has_text:
        reason = "the cache was imported without tokens and contexts"
        if corpus.has_units:
            reason = f"the cache has no tokens; its modality is {corpus.modality}"
        missing |= dict.fromkeys(NEED_TEXT, reason)
        if corpus.ctx_len > 1:
            del missing["position"]
    elif not corpus.label_names:
        missing["feature_label"] = "the documents of the text have no labels"
    return missing


def left_out_tables(*, metrics: bool, context_index: bool) -> dict[str, str]:
    """Optional table -> why it is left out."""
    left_out = {} if metrics else {"train_metric": "the run has no metrics.jsonl"}
    if not context_index:
        left_out["act_by_ctx"] = "it was indexed without --with-context-index"
    return left_out


def index_by_context(connection: duckdb.DuckDBPyConnection, corpus: Corpus, runs: SortedSpill) -> None:
    """Fill act_by_ctx: one row for each token on which a latent fires."""
    for latent_S, row_S, value_S in runs.by_row():
        starts_R = np.flatnonzero(np.concatenate([[True], row_S[1:] != row_S[:-1]]))
        n_R, row_R = np.diff(starts_R, append=len(row_S)), row_S[starts_R]
        insert(
            connection,
            schema.ACT_BY_CTX,
            {
                "ctx": corpus.ctx_of(row_R),
                "pos": corpus.pos_of(row_R),
                "features": list_column(latent_S, n_R),
                "acts": list_column(value_S, n_R),
            },
        )


def _act_rows(acts: Activations, corpus: Corpus) -> dict[str, Any]:
    return {
        "feature": (acts.latent_S + acts.first).astype(np.uint32),
        "ctx": corpus.ctx_of(acts.row_S).astype(np.uint32),
        "pos": corpus.pos_of(acts.row_S).astype(np.uint32),
        "value": acts.value_S,
    }


def _feature_rows(acts: Activations, columns: dict[str, Any], static: StaticData) -> dict[str, Any]:
    latents = slice(acts.first, acts.first + acts.n_latents)
    known = {name: column[latents] for name, column in static.columns.items()} | columns
    known["feature"] = np.arange(latents.start, latents.stop)
    return {name: known.get(name, [None] * acts.n_latents) for name in schema.FEATURE.names}
