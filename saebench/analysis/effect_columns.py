"""index_effects: publish the effects of latents as columns of the feature table of a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.analysis.attach import run_folder
from saebench.analysis.contexts import draw_contexts
from saebench.analysis.effects import LossEffects, loss_effects
from saebench.analysis.settings import EffectsConfig
from saebench.core.device import pick_device
from saebench.core.errors import UserError
from saebench.core.files import directory_lock
from saebench.core.settings import accepts_settings
from saebench.runs.run import Run
from saebench.saes.base import SAE
from saebench.saes.files import weights_hash

if TYPE_CHECKING:
    import duckdb

    from saebench.activations.cache import ActivationCache

EXTRA = "effects"


@accepts_settings(EffectsConfig)
def index_effects(config: EffectsConfig) -> LossEffects:
    """Measure `loss_effects` of an SAE and publish them as columns of its feature table in ``config.store``.

    The store gets a new generation, in which the columns loss_effect, kl, loss_effect_n, loss_estimate and
    loss_estimate_n can be filtered and sorted by; earlier effects are replaced.

    >>> indexed = sb.index(run=run, cache=cache, out="store", quiet=True)
    >>> found = sb.index_effects("store", run=run, contexts=1, sample=4, quiet=True)
    >>> ordered = sb.open_store("store").features(order_by="loss_effect", descending=True)
    >>> bool(ordered["loss_effect"][0] == found.features["loss_effect"].max())
    True

    Raises:
        UserError: the store does not have this SAE, or indexed it over another cache, and what
            `loss_effects` raises.
    """
    from saebench.activations.cache import open_cache
    from saebench.sources.models import load_model

    run = Run(run_folder(config.run))
    cache = open_cache(config.cache) if config.cache is not None else run.open_cache()
    device = pick_device(config.device)
    sae = run.load(device=device)
    name, info = _find_in_store(config, sae, cache)
    draw_contexts(cache, 1, rows=config.rows, seed=config.seed)  # raises before a model is loaded
    with directory_lock(config.store, what="the feature store"):
        pass  # raises when the store is being written
    assert cache.model is not None, "contexts without the model that read them"
    named, revision = config.model, None
    if named == "cache":
        named, revision = cache.model["name"], cache.model.get("revision")
    model = load_model(named, revision=revision, device=device)
    found = loss_effects(
        sae, cache, model, info["hook_name"], contexts=config.contexts, sample=config.sample,
        rows=config.rows, seed=config.seed, quiet=config.quiet,
    )  # fmt: skip
    publish_effects(config.store, name, info, found, settings={
        "contexts": config.contexts, "sample": config.sample, "rows": config.rows, "seed": config.seed,
    })  # fmt: skip
    return found


def publish_effects(
    store: Path, sae: str, info: dict[str, Any], found: LossEffects, settings: dict[str, Any]
) -> None:
    """Publish the effects of the SAE ``sae`` in a store; ``info`` is its FeatureStore.info()."""
    from saebench.store.database import insert
    from saebench.store.extras import publish_extra
    from saebench.store.schema import EFFECT

    rows = found.features[found.features["loss_estimate_n"] > 0]

    def build(connection: duckdb.DuckDBPyConnection) -> dict[str, Any]:
        columns = {name: rows[name].to_numpy() for name in EFFECT.names}
        for name in ("loss_effect", "kl"):
            columns[name] = [
                None if missing else value
                for value, missing in zip(rows[name], rows[name].isna(), strict=True)
            ]
        insert(connection, EFFECT, columns)
        return {**settings, "correlation": found.correlation, "n_contexts": found.n_contexts}

    publish_extra(Path(store), sae, EXTRA, build, made_from=info)


def _find_in_store(config: EffectsConfig, sae: SAE, cache: ActivationCache) -> tuple[str, dict[str, Any]]:
    """The name and info of this SAE in the store."""
    from saebench.store.query import open_store

    with open_store(config.store) as first:
        names = first.saes
    identity = weights_hash(sae)
    for name in names:
        with open_store(config.store, name) as store:
            info = store.info()
        if info["sae_hash"] != identity:
            continue
        if info["cache_hash"] != cache.hash:
            raise UserError(
                f"the store {config.store} indexed {name!r} over a cache other than {cache.path}; give that "
                "cache with --cache"
            )
        return name, info
    raise UserError(
        f"the store {config.store} does not have the SAE {config.run}: its weights differ from those of "
        f"{', '.join(names)}; run saebench index to add it to that store first"
    )
