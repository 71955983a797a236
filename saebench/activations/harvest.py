"""harvest: run a model over a text, or any other source, once, and write its activations to a cache."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from saebench.activations.cache import ActivationCache
from saebench.activations.module_source import ModuleSource
from saebench.activations.settings import SourceConfig
from saebench.activations.text_source import harvest as harvest_text
from saebench.activations.writing import Target, warn_of_held_out, write_cache
from saebench.core.errors import UserError
from saebench.core.settings import from_flat


@functools.wraps(harvest_text)
def harvest(first: Any = None, /, *, source: ModuleSource | None = None, **settings: Any) -> ActivationCache:
    if source is None and isinstance(first, ModuleSource):
        first, source = None, first
    if source is None:
        return harvest_text(first, **settings)
    if first is not None:
        settings = {"out": first, **settings}
    if not isinstance(source, ModuleSource):
        raise UserError(f"source is a {type(source).__name__}; it must be a saebench.ModuleSource")
    config = from_flat(SourceConfig, settings, source="the call of harvest with a source")
    source.configure(config)
    target = Target(out=config.out, shard_rows=config.shard_rows, quiet=config.quiet, total=config.tokens)
    cache, made = write_cache(source, target)
    if made:
        warn_of_held_out(cache, "harvest more units")
    return cache


def _with_source(signature: inspect.Signature) -> inspect.Signature:
    source = inspect.Parameter("source", inspect.Parameter.KEYWORD_ONLY, default=None)
    return signature.replace(parameters=[*signature.parameters.values(), source])


harvest.__signature__ = _with_source(inspect.signature(harvest_text))  # type: ignore[attr-defined]
