"""The registry of export formats; a package adds one with the entry-point group below."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from saebench.core.registry import Registry

if TYPE_CHECKING:
    from saebench.store.query import FeatureStore


class StoreExporter(Protocol):
    """Interface of a registered module or object. ``features`` are feature numbers; None means all."""

    def check(self, store: FeatureStore, features: list[int] | None) -> None:
        """Raise a UserError if the store has not all that this form needs."""

    def write(self, store: FeatureStore, features: list[int] | None, directory: Path) -> tuple[str, ...]:
        """Write into the empty ``directory``; returns notes for the reader, one sentence each."""


store_exports = Registry(
    "a form of store exports",
    "saebench.store_exports",
    {name: f"saebench.store.exports.{name}" for name in ("parquet", "html", "delphi", "neuronpedia")},
)
"""Name -> module or object with the functions of `StoreExporter`."""
