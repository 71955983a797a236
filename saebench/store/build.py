"""``saebench index``: encode a cache with an SAE, once, and write what every latent does as a store."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from saebench.config import IndexConfig
from saebench.device import pick_device
from saebench.errors import UserError
from saebench.fields import station
from saebench.files import directory_lock, read_json, require_disk, require_writable
from saebench.progress import progress
from saebench.store import publish, schema
from saebench.store.corpus import Corpus
from saebench.store.database import insert, insert_meta, new_database, sentence_for_duckdb_errors
from saebench.store.examples import examples
from saebench.store.extras import kept_extras
from saebench.store.geometry import directions, nearest_decoders, neighbor_rows
from saebench.store.logits import find_unembedding, logit_rows
from saebench.store.runs import BYTES_PER_ENTRY, Runs
from saebench.store.statistics import activation_statistics, histograms, token_statistics
from saebench.store.text import token_text
from saebench.store.textfile import write_text_file

if TYPE_CHECKING:
    from saebench.activations.cache import ActivationCache
    from saebench.saes.base import SAE
    from saebench.store.query import FeatureStore

GROUP_SIZE = 4_000_000
"""Activations of which the tables are made at once; bounds memory, at some 150 bytes an activation."""

STORED_BYTES_PER_ACTIVATION = 10
TEXT_TABLES = ("context", "token", "document", "feature_token")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a build needs to know beside the SAE and the cache; see IndexConfig."""

    name: str
    hook: str
    examples: int = 20
    window: int = 32
    batch_size: int = 8192
    seed: int = 0
    quiet: bool = False


@station(IndexConfig)
def index(config: IndexConfig) -> FeatureStore:
    """Encode all rows of a cache and publish the result as a new generation of the store ``config.out``.

    An SAE of the same name is replaced, others stay as they are. Readers go on with the generation they
    opened. A process killed at any instant leaves the store as it was.

    Raises:
        UserError: the SAE does not fit the cache, activations are not finite, the model named is the wrong
            one, the disk is too small or full, or another process writes the store.
    """
    from saebench.activations.cache import open_cache
    from saebench.saes import load
    from saebench.store.query import open_store

    sae = load(config.run, device=pick_device(config.device))
    cache = open_cache(config.cache)
    hook = choose_hook(cache, config.hook, config.run)
    check_fit(sae, cache, hook)
    require_writable(config.out, what="the feature store")
    publish.before_next(config.out)
    W_U_DV, no_logits = find_unembedding(config.model, cache, hook, cache.vocab())
    name = config.name or Path(config.run).resolve().name
    options = Options(
        name=name, hook=hook, examples=config.examples, window=config.window, batch_size=config.batch_size,
        seed=config.seed, quiet=config.quiet,
    )  # fmt: skip
    report = Path(config.run) / "eval.json"
    evaluation = read_json(report, what="the evaluation") if report.exists() else None
    build_store(config.out, sae, cache, options, W_U_DV=W_U_DV, no_logits=no_logits, evaluation=evaluation)
    return open_store(config.out, name)


def choose_hook(cache: ActivationCache, hook: str | None, run: Path) -> str:
    """The hook to encode: ``hook``, else the one the SAE was trained on, else the cache's only one."""
    description = Path(run) / "sae.json"
    known = read_json(description, what="the SAE description") if description.exists() else {}
    trained_on = known.get("hook_name")
    wanted = hook or trained_on
    if wanted is None and len(cache.hooks) > 1:
        raise UserError(f"the cache {cache.path} has several hooks, {', '.join(cache.hooks)}; pass --hook")
    if wanted is not None and wanted not in cache.hooks:
        whose = "was asked for" if hook else f"is what {run} was trained on"
        raise UserError(
            f"hook {wanted!r} {whose} but the cache {cache.path} has {', '.join(cache.hooks)}; "
            "pass --hook with one of these, or another cache"
        )
    return wanted or cache.hooks[0]


def check_fit(sae: SAE, cache: ActivationCache, hook: str) -> None:
    if sae.d_in != cache.d_in(hook):
        raise UserError(
            f"the SAE has d_in {sae.d_in} but {hook} in the cache {cache.path} has d_in {cache.d_in(hook)}; "
            "pass the cache of the layer it was trained on"
        )


def build_store(
    out: Path, sae: SAE, cache: ActivationCache, options: Options, *, W_U_DV: Tensor | None = None,
    no_logits: str = "", evaluation: dict[str, Any] | None = None,
) -> publish.Manifest:  # fmt: skip
    """Write one SAE into the store ``out`` and publish it as the next generation.

    Args:
        W_U_DV: [d_in, vocabulary] unembedding for the logits; without it ``no_logits`` says why.
        evaluation: what eval.json says of the SAE.
    """
    corpus = Corpus(cache)
    missing = _missing(corpus, W_U_DV, no_logits)
    with directory_lock(out, what="the feature store"):
        current, building = publish.begin(out)
        try:
            require_disk(out, forecast(sae, corpus, options), what="indexing (runs and store together)")
            with sentence_for_duckdb_errors(building):
                text = None
                if corpus.has_text and not has_text_file(out, current, corpus):
                    path = building / f"text-{corpus.hash[:12]}.duckdb"
                    write_text_file(path, corpus, name=text_name(cache))
                    text = publish.describe(path)
                identity = hash_of(sae)
                path = building / f"sae-{identity[:12]}.duckdb"
                runs = encode(building / "runs", sae, cache, options)
                meta = {
                    "format_version": schema.FORMAT_VERSION, "name": options.name, "sae": sae.spec.name,
                    "d_in": sae.d_in, "d_sae": sae.d_sae, "k": sae.k, "hook_name": options.hook,
                    "model": (cache.model or {}).get("name"), "text": text_name(cache),
                    "n_tokens": corpus.n_rows, "n_contexts": corpus.n_contexts,
                    "n_documents": corpus.n_documents if corpus.has_text else 0,
                    "n_activations": runs.n_activations, "eval": evaluation, "missing": missing,
                    "sae_hash": identity, "cache_hash": cache.hash, "examples": options.examples,
                    "window": options.window, "seed": options.seed,
                }  # fmt: skip
                write_sae_file(path, sae, corpus, runs, options, W_U_DV, meta)
                shutil.rmtree(building / "runs")
            key = corpus.hash if corpus.has_text else None
            extras = kept_extras(out, current, options.name, meta)
            stored = publish.StoredSae(
                name=options.name, file=publish.describe(path), text=key, extras=extras
            )
            return publish.publish(out, current, stored, text)
        finally:
            shutil.rmtree(building, ignore_errors=True)


@torch.inference_mode()
def encode(directory: Path, sae: SAE, cache: ActivationCache, options: Options) -> Runs:
    """The one pass over the cache: the codes of every row into sorted runs.

    Raises:
        UserError: an activation or a code is not finite.
    """
    x_ND = cache.activations(options.hook)
    device = sae.W_dec.device
    runs = Runs(directory, sae.d_sae)
    with progress("encode", total=cache.n_rows, unit="tok", quiet=options.quiet) as bar:
        for start in range(0, cache.n_rows, options.batch_size):
            batch_ND = x_ND[start : start + options.batch_size].to(device, torch.float32)
            if not batch_ND.isfinite().all():
                row = start + int((~batch_ND.isfinite()).any(1).nonzero()[0])
                raise UserError(
                    f"row {row} of {options.hook} in the cache {cache.path} has values that are not finite; "
                    "make the cache again"
                )
            row_S, latent_S, value_S = (part.cpu().numpy() for part in sae.encode(batch_ND).coo())
            if not np.isfinite(value_S).all():
                raise UserError(f"the SAE {options.name!r} gives codes that are not finite; train it again")
            runs.add(latent_S, row_S + start, value_S)
            bar.update(len(batch_ND))
    runs.flush()
    return runs


def write_sae_file(
    path: Path,
    sae: SAE,
    corpus: Corpus,
    runs: Runs,
    options: Options,
    W_U_DV: Tensor | None,
    meta: dict[str, Any],
) -> None:
    """Write all tables of one SAE; those in ``meta["missing"]`` are left out."""
    tables = [table for name, table in schema.SAE_TABLES.items() if name not in meta["missing"]]
    W_dec_MD = sae.W_dec.detach()
    other_MJ, cosine_MJ = nearest_decoders(W_dec_MD)
    constant: dict[str, Any] = directions(sae.W_enc.detach().T, W_dec_MD)
    alone = other_MJ.shape[1] == 0
    constant["dec_max_cos"] = [None] * sae.d_sae if alone else cosine_MJ[:, 0].numpy()
    constant["dec_nn"] = [None] * sae.d_sae if alone else other_MJ[:, 0].numpy()
    constant["logit_top"] = [None] * sae.d_sae
    title = "tables"
    with (
        new_database(path, tables) as connection,
        progress(title, total=runs.n_activations, unit="act", quiet=options.quiet) as bar,
    ):
        insert(connection, schema.NEIGHBOR, neighbor_rows(other_MJ, cosine_MJ))
        if W_U_DV is not None:
            logits = logit_rows(W_dec_MD, W_U_DV)
            insert(connection, schema.LOGIT, logits)
            best = logits["token"].reshape(sae.d_sae, -1)[:, 0]
            constant["logit_top"] = [token_text(corpus.vocab[token]) for token in best]
        for acts in runs.groups(GROUP_SIZE):
            latents = slice(acts.first, acts.first + acts.n_latents)
            insert(connection, schema.ACT, {
                "feature": acts.latent_S + acts.first,
                "ctx": corpus.ctx[acts.row_S] if corpus.has_text else acts.row_S,
                "pos": corpus.pos[acts.row_S] if corpus.has_text else np.zeros_like(acts.row_S),
                "value": acts.value_S,
            })  # fmt: skip
            columns = {name: column[latents] for name, column in constant.items()}
            columns |= activation_statistics(acts, corpus)
            columns["feature"] = np.arange(latents.start, latents.stop)
            if corpus.has_text:
                rows, token_columns = token_statistics(acts, corpus)
                insert(connection, schema.FEATURE_TOKEN, rows)
                columns |= token_columns
            else:
                columns |= dict.fromkeys(
                    ("top_token", "top_token_share", "entropy_tok"), [None] * acts.n_latents
                )
            insert(connection, schema.FEATURE, columns)
            insert(connection, schema.HIST, histograms(acts))
            insert(connection, schema.EXAMPLE, examples(
                acts, corpus, n=options.examples, window=options.window, seed=options.seed))  # fmt: skip
            bar.update(len(acts.row_S))
        insert_meta(connection, schema.SAE_META, meta)


def has_text_file(store: Path, current: publish.Manifest, corpus: Corpus) -> bool:
    """Whether the store has the file of this text, undamaged."""
    file = current.texts.get(corpus.hash)
    return file is not None and publish.is_intact(store, file)


def forecast(sae: SAE, corpus: Corpus, options: Options) -> int:
    """Bytes that a build writes at most, its temporary runs included."""
    n_activations = corpus.n_rows * min(sae.k, sae.d_sae)
    shown = min(2 * options.examples * sae.d_sae, 2 * n_activations)
    examples_bytes = shown * (20 + 6 * options.window * corpus.has_text)
    text_bytes = 8 * corpus.n_contexts * corpus.ctx_len
    latents = sae.d_sae * 1500
    return (
        n_activations * (BYTES_PER_ENTRY + STORED_BYTES_PER_ACTIVATION)
        + examples_bytes
        + text_bytes
        + latents
    )


def hash_of(sae: SAE) -> str:
    """SHA-256 of an SAE's weights."""
    digest = hashlib.sha256(sae.spec.name.encode())
    for name in sae.weight_names:
        weight: Tensor = getattr(sae, name)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def text_name(cache: ActivationCache) -> str | None:
    """What the cache calls its text, if it has one."""
    text = cache.manifest.get("made_from", {}).get("text")
    return text.get("name") if isinstance(text, dict) else text


def _missing(corpus: Corpus, W_U_DV: Tensor | None, no_logits: str) -> dict[str, str]:
    missing = {} if W_U_DV is not None else {"logit": no_logits}
    if not corpus.has_text:
        missing |= dict.fromkeys(TEXT_TABLES, "the cache was imported without tokens and contexts")
    return missing
