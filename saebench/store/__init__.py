"""Feature stores: activations and statistics of each latent of an SAE on a text, for pages and notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saebench.core.lazy import lazy_names

if TYPE_CHECKING:
    from saebench.store.annotations import Annotations
    from saebench.store.build import index
    from saebench.store.check import check_store, store_info
    from saebench.store.exports import export_store
    from saebench.store.query import FeatureStore, open_store
    from saebench.store.rebuild import rebuild_store

_HOMES = {
    "Annotations": "annotations",
    "FeatureStore": "query",
    "check_store": "check",
    "export_store": "exports",
    "index": "build",
    "open_store": "query",
    "rebuild_store": "rebuild",
    "store_info": "check",
}

__all__ = [
    "Annotations",
    "FeatureStore",
    "check_store",
    "export_store",
    "index",
    "open_store",
    "rebuild_store",
    "store_info",
]

__getattr__ = lazy_names(__name__, _HOMES)
