"""Comparison of a store's tables with the SAE, the cache and the model that they were computed from.

Shapes: R rows sampled, F latents sampled, M latents, D = d_in, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from saebench.core.errors import UserError
from saebench.core.hashing import hash_random, uniform_below
from saebench.saes.files import weights_hash
from saebench.store.corpus import Corpus
from saebench.store.database import tables_of
from saebench.store.geometry import directions, nearest_rows
from saebench.store.logits import find_unembedding, logit_rows
from saebench.store.schema import NEIGHBOR_KINDS
from saebench.store.sites import (
    SITES_EXTRA,
    cache_rows,
    check_fit,
    comparable_rows,
    crosscoder_columns,
    read_sites,
    site_norms,
    site_std,
    written_part,
    written_sites,
)

if TYPE_CHECKING:
    import duckdb

    from saebench.activations.cache import ActivationCache
    from saebench.saes.base import SAE
    from saebench.saes.spec import SiteWidth

SAMPLED_ROWS = 4096
SAMPLED_FEATURES = 64
MOST_FLIPPED = 1e-3
"""Largest fraction of codes on one side only: another batch may resolve near ties differently."""


def load_references(
    run: Path | None, cache: Path | None, model: str
) -> tuple[SAE | None, ActivationCache | None]:
    """The SAE and the cache to compare a store with.

    Raises:
        UserError: a cache is named without a run, or a model without a cache.
    """
    from saebench.activations.cache import open_cache
    from saebench.runs.run import load

    if run is None:
        for name, value in (("--cache", cache), ("--model", None if model == "none" else model)):
            if value is not None:
                raise UserError(f"{name} {value} is compared with the codes of an SAE; say which with --run")
        return None, None
    if cache is None and model != "none":
        raise UserError(f"--model {model} is compared through the cache that it made; say which with --cache")
    return load(run, device=torch.device("cpu")), open_cache(cache) if cache else None


def problems(
    connection: duckdb.DuckDBPyConnection,
    meta: dict[str, Any],
    text: str | None,
    sae: SAE,
    cache: ActivationCache | None,
    model: str,
) -> Iterator[str]:
    """The problems found in the tables of one SAE of a store, one sentence each.

    Raises:
        UserError: the cache or the model is not the one that the store was made with.
    """
    yield from _directions(connection, sae, meta.get("site_std"))
    if "site_std" in meta and tables_of(connection, SITES_EXTRA):
        yield from _site_norms(connection, sae, meta["site_std"])
    if cache is None:
        return
    if cache.hash != meta["cache_hash"]:
        raise UserError(
            f"the cache {cache.path} is not the one that the store was made from: its hash is "
            f"{cache.hash[:12]}, but the store was made from {meta['cache_hash'][:12]}; pass that cache, or "
            "leave --cache out"
        )
    check_fit(sae, cache, meta["hook_name"])
    corpus = Corpus(cache)
    if corpus.has_units and corpus.hash != text:
        yield "the text file is not that of the cache's text"
    sites = read_sites(sae, meta["hook_name"])
    yield from _codes(connection, sae, cache, corpus, sites)
    if "site_std" in meta and not np.allclose(site_std(cache, sites), meta["site_std"], rtol=1e-6):
        yield "the standard deviations of the sites are not those of the cache"
    if model != "none" and "logit" not in meta["missing"]:
        unembedding, reason = find_unembedding(
            model, cache, written_sites(sae, meta["hook_name"]), cache.vocab()
        )
        if unembedding is None:
            raise UserError(f"logits cannot be compared: {reason}; leave --model out")
        yield from _logits(connection, written_part(sae, unembedding.site), unembedding.W_U_DV)


def is_of(sae: SAE, meta: dict[str, Any]) -> bool:
    """Whether the tables were computed from this SAE."""
    return bool(weights_hash(sae) == meta["sae_hash"])


@torch.no_grad()
def _directions(
    connection: duckdb.DuckDBPyConnection, sae: SAE, site_std: list[float] | None
) -> Iterator[str]:
    W_dec_MD, W_enc_MD = sae.W_dec.detach(), sae.W_enc.detach().T
    expected: dict[str, Any] = directions(W_enc_MD, W_dec_MD) | {"b_enc": sae.b_enc.detach().float().numpy()}
    names = ", ".join(expected)
    shown = connection.execute(f"SELECT {names} FROM sae.feature ORDER BY feature").fetchnumpy()
    for name, column_M in expected.items():
        stored_M = np.ma.getdata(shown[name])[~np.ma.getmaskarray(shown[name])]
        if len(stored_M) and not np.allclose(stored_M, column_M, rtol=1e-3, atol=1e-4):
            yield f"{name} is not that of the SAE's weights"
    feature_F = _sampled(sae.d_sae)
    W_enc_MD, W_dec_MD = comparable_rows(sae, site_std)
    for kind, W_MD in (("decoder", W_dec_MD), ("encoder", W_enc_MD)):
        rows = connection.execute(
            "SELECT score, other FROM sae.neighbor WHERE kind = ? AND list_contains(?, feature) ORDER BY "
            "feature, rank",
            [NEIGHBOR_KINDS[kind], feature_F.tolist()],
        ).fetchnumpy()
        if not len(rows["score"]):
            continue
        _, cosine_FJ = nearest_rows(W_MD, of=torch.from_numpy(feature_F))
        if rows["score"].shape != (cosine_FJ.numel(),) or not np.allclose(
            rows["score"], cosine_FJ.reshape(-1).numpy(), atol=1e-3
        ):
            yield f"the neighbors by {kind} are not those of the SAE's weights"


def _site_norms(connection: duckdb.DuckDBPyConnection, sae: SAE, std: list[float]) -> Iterator[str]:
    query = "SELECT norm FROM sites.site_norm ORDER BY feature, site"
    stored = connection.execute(query).fetchnumpy()["norm"]
    expected = site_norms(sae, std).cpu().numpy().reshape(-1)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-3, atol=1e-6):
        yield "the decoder norms of the sites are not those of the SAE's weights"
    query = "SELECT site_cos FROM sites.crosscoder ORDER BY feature"
    cosines = np.array([cosine for (cosine,) in connection.execute(query).fetchall()], float)
    expected = np.array(crosscoder_columns(sae, std)["site_cos"], float)
    if cosines.shape != expected.shape or not np.allclose(cosines, expected, atol=1e-4, equal_nan=True):
        yield "the cosines between the sites are not those of the SAE's weights"


@torch.inference_mode()
def _codes(
    connection: duckdb.DuckDBPyConnection,
    sae: SAE,
    cache: ActivationCache,
    corpus: Corpus,
    sites: tuple[SiteWidth, ...],
) -> Iterator[str]:
    row_R = np.unique(uniform_below(hash_random(np.arange(SAMPLED_ROWS), 4, 0), corpus.n_rows))
    x_RD = cache_rows(cache, sites, torch.from_numpy(row_R))
    at_S, latent_S, value_S = (part.cpu().numpy() for part in sae.encode(x_RD).coo())
    expected: dict[tuple[int, int], float] = {}
    for at, latent, value in zip(at_S.tolist(), latent_S.tolist(), value_S.tolist(), strict=True):
        expected[at, latent] = expected.get((at, latent), 0.0) + value
    import pyarrow

    places = pyarrow.table(
        {
            "place": np.arange(len(row_R)),
            "ctx": corpus.ctx_of(row_R).astype(np.int64),
            "pos": corpus.pos_of(row_R).astype(np.int64),
        }
    )
    query = "SELECT place, feature, value FROM sae.act JOIN places USING (ctx, pos)"
    connection.register("places", places)
    rows = connection.execute(query).fetchnumpy()
    connection.unregister("places")
    keys = zip(rows["place"].tolist(), rows["feature"].tolist(), strict=True)
    stored = dict(zip(keys, rows["value"].tolist(), strict=True))
    wrong = [
        key
        for key, value in stored.items()
        if key in expected and abs(expected[key] - value) > 1e-3 * (1 + abs(value))
    ]
    if wrong:
        feature = wrong[0][1]
        yield f"activations are not the SAE's codes of the cache ({len(wrong):,} times, first {feature})"
    flipped = {key for key in stored.keys() ^ expected.keys() if expected.get(key, 1.0) != 0}
    if len(flipped) > MOST_FLIPPED * len(expected):
        first = min(latent for _, latent in flipped)
        yield f"the SAE's codes of the cache are others than those stored ({len(flipped):,}, first {first})"


@torch.no_grad()
def _logits(connection: duckdb.DuckDBPyConnection, W_dec_MD: Tensor, W_U_DV: Tensor) -> Iterator[str]:
    feature_F = _sampled(len(W_dec_MD))
    expected, columns = logit_rows(W_dec_MD[torch.from_numpy(feature_F)], W_U_DV)
    shown = connection.execute(
        "SELECT value FROM sae.logit WHERE list_contains(?, feature) ORDER BY feature, sign DESC, rank",
        [feature_F.tolist()],
    ).fetchnumpy()["value"]
    if shown.shape != expected["value"].shape or not np.allclose(
        shown, expected["value"], rtol=1e-3, atol=1e-4
    ):
        yield "logits are not those of the SAE and the model"
    kurtosis = connection.execute(
        "SELECT logit_kurtosis FROM sae.feature WHERE list_contains(?, feature) AND logit_kurtosis IS NOT "
        "NULL ORDER BY feature",
        [feature_F.tolist()],
    ).fetchnumpy()["logit_kurtosis"]
    if len(kurtosis) and not np.allclose(kurtosis, columns["logit_kurtosis"], rtol=1e-2, atol=1e-2):
        yield "logit_kurtosis is not that of the SAE and the model"


def _sampled(d_sae: int) -> Any:
    """Latents whose tables are computed again, ascending."""
    return np.unique(uniform_below(hash_random(np.arange(SAMPLED_FEATURES), 5, 0), d_sae))
