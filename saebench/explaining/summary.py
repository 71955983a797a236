"""Summary of explanations: how many features have one, and the scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saebench.explaining.provider import shown_name
from saebench.explaining.settings import ExplainConfig

if TYPE_CHECKING:
    from saebench.store.query import FeatureStore


def summarize(store: FeatureStore, config: ExplainConfig) -> dict[str, Any]:
    """The summary of all explanations that the store has from this provider and model.

    Keys: path, generation, provider, model, and those of FeatureStore.explanation_summary.
    """
    model = shown_name(config.model) if config.model else ""
    return {
        "path": str(store.path),
        "generation": store.generation,
        "provider": config.provider,
        "model": config.model,
        **store.explanation_summary(config.provider, model),
    }
