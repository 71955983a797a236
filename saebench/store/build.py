"""``saebench index``: encode a cache with one or more SAEs, and write a feature store."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from saebench.core.device import pick_device
from saebench.core.errors import UserError
from saebench.core.files import directory_lock, require_disk, require_writable
from saebench.core.settings import accepts_settings
from saebench.saes.files import weights_hash
from saebench.store import publish, schema, tables
from saebench.store.corpus import Corpus
from saebench.store.database import sentence_for_duckdb_errors
from saebench.store.encode import ENCODED, Encoder, encode
from saebench.store.examples import per_decile
from saebench.store.extras import keep_extras
from saebench.store.logits import find_unembedding
from saebench.store.settings import IndexConfig
from saebench.store.sites import (
    SITES_EXTRA,
    check_fit,
    read_sites,
    site_std,
    sites_meta,
    write_sites_file,
    written_sites,
)
from saebench.store.sorted_spill import BYTES_PER_ENTRY, SortedSpill
from saebench.store.tables import (
    Build,
    TableOptions,
    TableTimer,
    index_by_context,
    left_out_tables,
    missing_tables,
    static_data,
    write_sae_file,
)
from saebench.store.textfile import write_text_file, write_unit_file

if TYPE_CHECKING:
    from saebench.activations.cache import ActivationCache
    from saebench.runs.run import Run
    from saebench.saes.base import SAE
    from saebench.store.query import FeatureStore

STORED_BYTES_PER_ACTIVATION = 10
INDEX_BYTES_PER_ACTIVATION = 9


@dataclass(frozen=True, kw_only=True)
class Options(TableOptions):
    """Options of indexing one SAE; see IndexConfig."""

    name: str
    hook: str
    batch_size: int = 8192
    context_index: bool = False


@dataclass(frozen=True, kw_only=True)
class IndexJob:
    """One SAE to index.

    ``W_U_DV`` is the unembedding [width, vocabulary] for the logits, and ``logit_site`` the one of several
    targets that it reads; without it, ``no_logits`` is the reason.
    ``evaluation`` is the content of eval.json, ``metrics`` the path of the run's metrics.jsonl.
    """

    sae: SAE
    options: Options
    W_U_DV: Tensor | None = None
    logit_site: str | None = None
    no_logits: str = ""
    evaluation: dict[str, Any] | None = None
    metrics: Path | None = None


@accepts_settings(IndexConfig)
def index(config: IndexConfig) -> FeatureStore:
    """Encode all rows of a cache and publish the result as a new generation of the store ``config.out``.

    An SAE of the same name is replaced; others are not changed. Readers continue with the generation that
    they opened. A process that is killed at any time leaves the store unchanged, and the same call resumes.
    The returned store is open at the first SAE.

    >>> with sb.index(run=run, cache=cache, out="another", quiet=True) as made:
    ...     made.info()["d_sae"] == sb.load(run).d_sae
    True

    Raises:
        UserError: an SAE does not fit the cache, activations are not finite, the model named is the wrong
            one, the disk is too small or full, or another process writes the store.
    """
    from saebench.activations.cache import open_cache
    from saebench.runs.run import Run
    from saebench.store.query import open_store

    runs = [Run(path) for path in (config.run, *config.also)]
    names = [config.name or run.path.resolve().name for run in runs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two of the runs are called {twice!r}; index them one by one, each with --name")
    cache = open_cache(config.cache)
    hooks = [choose_hook(cache, config.hook, run) for run in runs]
    saes = [run.load(device=pick_device(config.device)) for run in runs]
    for run, sae, hook in zip(runs, saes, hooks, strict=True):
        own = [site.name for site in sae.spec.sites]
        if config.hook and own and own != [config.hook]:
            raise UserError(f"--site is {config.hook}, but {run} reads {', '.join(own)}; leave --site out")
        check_fit(sae, cache, hook)
        run.warn_of_other_model(cache)
    require_writable(config.out, what="the feature store")
    publish.before_next(config.out)
    written = [written_sites(sae, hook) for sae, hook in zip(saes, hooks, strict=True)]
    unembeddings = {
        sites: find_unembedding(config.model, cache, sites, cache.vocab()) for sites in set(written)
    }
    jobs = []
    for run, sae, name, hook, sites in zip(runs, saes, names, hooks, written, strict=True):
        options = Options(
            name=name,
            hook=hook,
            examples=config.examples,
            window=config.window,
            seed=config.seed,
            batch_size=config.batch_size,
            context_index=config.with_context_index,
            quiet=config.quiet,
        )
        unembedding, no_logits = unembeddings[sites]
        jobs.append(
            IndexJob(
                sae=sae,
                options=options,
                W_U_DV=None if unembedding is None else unembedding.W_U_DV,
                logit_site=None if unembedding is None else unembedding.site,
                no_logits=no_logits,
                evaluation=run.evaluation(),
                metrics=run.metrics_file if run.metrics_file.is_file() else None,
            )
        )
    build_all(config.out, jobs, cache)
    return open_store(config.out, names[0])


def choose_hook(cache: ActivationCache, hook: str | None, run: Run) -> str:
    """The hook to encode: ``hook``, or the one that the SAE was trained on, or the only hook of the cache.

    For an SAE that reads several sites it is the first.
    """
    wanted = hook or (run.provenance.hook_name if run.is_finished or run.checkpoint is not None else None)
    if wanted is None and len(cache.hooks) > 1:
        raise UserError(f"the cache {cache.path} has several hooks, {', '.join(cache.hooks)}; pass --site")
    if wanted is not None and wanted not in cache.hooks:
        whose = "was asked for" if hook else f"is what {run} was trained on"
        raise UserError(
            f"hook {wanted!r} {whose} but the cache {cache.path} has {', '.join(cache.hooks)}; "
            "pass --site with one of these, or another cache"
        )
    return wanted or cache.hooks[0]


def build_all(out: Path, jobs: Sequence[IndexJob], cache: ActivationCache) -> publish.Manifest:
    """Write SAEs into the store ``out``, in one pass over the cache, and publish them as one generation."""
    corpus = Corpus(cache)
    out = Path(out)
    encoders = [
        Encoder(
            name=job.options.name,
            sae=job.sae,
            sites=read_sites(job.sae, job.options.hook),
            identity=weights_hash(job.sae),
        )
        for job in jobs
    ]
    with directory_lock(out, what="the feature store"):
        current, building = publish.begin(out)
        encoded = out / ENCODED
        try:
            there = sum(path.stat().st_size for path in encoded.rglob("*") if path.is_file())
            needed = sum(forecast(job.sae, corpus, job.options) for job in jobs)
            require_disk(out, needed - there, what="indexing (runs and store together)")
            with sentence_for_duckdb_errors(building):
                text = None
                if corpus.has_units and not has_text_file(out, current, corpus):
                    path = building / f"text-{corpus.hash[:12]}.duckdb"
                    if corpus.has_text:
                        write_text_file(path, corpus, name=text_name(cache))
                    else:
                        write_unit_file(path, corpus)
                    text = publish.describe(path)
                all_runs = encode(
                    encoded,
                    encoders,
                    cache,
                    batch_size=jobs[0].options.batch_size,
                    quiet=jobs[0].options.quiet,
                )
                stored = [
                    write_sae(building, job, encoder.identity, cache, corpus, runs)
                    for job, encoder, runs in zip(jobs, encoders, all_runs, strict=True)
                ]
            stored = [
                replace(kept, extras=kept.extras | sae.extras)
                for sae in stored
                for kept in [keep_extras(out, current, building, sae)]
            ]
            manifest = publish.publish(out, current, stored, text)
            shutil.rmtree(encoded)
            return manifest
        finally:
            shutil.rmtree(building, ignore_errors=True)


def write_sae(
    building: Path,
    job: IndexJob,
    identity: str,
    cache: ActivationCache,
    corpus: Corpus,
    runs: SortedSpill,
    timer: TableTimer | None = None,
) -> publish.StoredSae:
    """Write the file of one SAE in the build directory."""
    sae, options, timer = job.sae, job.options, timer or TableTimer()
    meta = {
        "format_version": schema.FORMAT_VERSION,
        "name": options.name,
        "sae": sae.spec.name,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "hook_name": options.hook,
        "model": model_name(cache, sae, options.hook),
        "modality": corpus.modality,
        "text": text_name(cache),
        "n_tokens": corpus.n_rows,
        "n_contexts": corpus.n_contexts,
        "ctx_len": corpus.ctx_len,
        "n_documents": corpus.n_documents if corpus.has_text else 0,
        "n_activations": runs.n_activations,
        "eval": job.evaluation,
        "missing": missing_tables(corpus, None if job.W_U_DV is not None else job.no_logits),
        "left_out": left_out_tables(metrics=bool(job.metrics), context_index=options.context_index),
        "sae_hash": identity,
        "cache_hash": cache.hash,
        "examples": options.examples,
        "window": options.window,
        "seed": options.seed,
        **sites_meta(sae, options.hook),
    }
    if len(cache.models) > 1:
        meta["models"] = [model["name"] for model in cache.models]
    if sae.spec.is_crosscoder:
        meta["site_std"] = site_std(cache, read_sites(sae, options.hook))
    if job.logit_site is not None and len(sae.spec.targets) > 1:
        meta["logit_site"] = job.logit_site
    taken = {path.name for path in building.glob("sae-*.duckdb")}
    name = f"sae-{identity[:12]}.duckdb"
    if name in taken:  # the same weights under two names
        name = f"sae-{identity[:12]}-{len(taken)}.duckdb"
    build = Build(
        corpus=corpus,
        d_sae=sae.d_sae,
        n_activations=runs.n_activations,
        groups=runs.groups(tables.GROUP_SIZE, tables.GROUP_LATENTS),
        options=options,
        timer=timer,
        static=static_data(
            sae,
            corpus,
            job.W_U_DV,
            job.metrics,
            timer,
            logit_site=job.logit_site,
            site_std=meta.get("site_std"),
        ),
        context_index=(lambda connection: index_by_context(connection, corpus, runs))
        if options.context_index
        else None,
    )
    write_sae_file(building / name, build, meta)
    key = corpus.hash if corpus.has_units else None
    extras = {}
    if sae.spec.is_crosscoder:
        extras[SITES_EXTRA] = publish.describe(write_sites_file(building, name, sae, meta))
    return publish.StoredSae(
        name=options.name, file=publish.describe(building / name), text=key, extras=extras
    )


def has_text_file(store: Path, current: publish.Manifest, corpus: Corpus) -> bool:
    """Whether the store has the file of this text, undamaged."""
    file = current.texts.get(corpus.hash)
    return file is not None and publish.is_intact(store, file)


def forecast(sae: SAE, corpus: Corpus, options: Options) -> int:
    """The most bytes that a build writes, temporary files included."""
    n_activations = corpus.n_rows * min(sae.k, sae.d_sae)
    shown = min(2 * options.examples * sae.d_sae, 2 * n_activations)
    shown += (10 * per_decile(options.examples) + 2 * options.examples) * min(sae.d_sae, n_activations)
    examples_bytes = shown * (20 + 6 * options.window * corpus.has_units)
    text_bytes = 8 * corpus.n_contexts * corpus.ctx_len
    latents = sae.d_sae * 6000
    inverse = 36 * schema.FEATURES_PER_TOKEN * len(corpus.vocab) if corpus.has_text else 0
    return (
        n_activations
        * (BYTES_PER_ENTRY + STORED_BYTES_PER_ACTIVATION + INDEX_BYTES_PER_ACTIVATION * options.context_index)
        + examples_bytes
        + text_bytes
        + latents
        + inverse
    )


def model_name(cache: ActivationCache, sae: SAE, hook: str) -> str | None:
    """The names of the models or the module that the sites of the SAE are in; None of an array."""
    if (module := cache.manifest.get("made_from", {}).get("module")) is not None:
        return str(module["name"])
    sites = (*read_sites(sae, hook), *written_sites(sae, hook))
    models = [cache.model_of(site.name) for site in sites if site.name in cache.hooks]
    names = dict.fromkeys(str(model["name"]) for model in models if model is not None)
    return " and ".join(names) or None


def text_name(cache: ActivationCache) -> str | None:
    """The name of the cache's text; None when it has no text."""
    text = cache.manifest.get("made_from", {}).get("text")
    return text.get("name") if isinstance(text, dict) else text
