"""What came of explaining: how many features, and how good the explanations are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saebench.explaining.provider import shown_name
from saebench.explaining.settings import ExplainConfig
from saebench.store.explanations import summary

if TYPE_CHECKING:
    from saebench.store.query import FeatureStore

SHOWN = 5


def summarize(store: FeatureStore, config: ExplainConfig) -> dict[str, Any]:
    """Of all explanations that the store has of this provider and model.

    Keys: path, generation, provider, model, and those of store.explanations.summary.
    """
    model = shown_name(config.model) if config.model else ""
    return {
        "path": str(store.path),
        "generation": store.generation,
        "provider": config.provider,
        "model": config.model,
        **summary(store, config.provider, model, shown=SHOWN),
    }
