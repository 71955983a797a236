"""What came of explaining: how many features, and how good the explanations are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saebench.config import ExplainConfig
from saebench.explaining.asking import shown_name
from saebench.store.explanations import summary

if TYPE_CHECKING:
    from saebench.store.query import FeatureStore

SHOWN = 5


def summarise(store: FeatureStore, config: ExplainConfig) -> dict[str, Any]:
    """Of all explanations that the store has of this provider and model.

    Keys: path, generation, provider, model, status (status -> features), scores (rows scorer, n, mean,
    median), best (rows feature, explanation, explanation_score; of any provider).
    """
    best = store.features(
        ["feature", "explanation", "explanation_score"], ranges={"explanation_score": (None, 1.0)},
        order_by="explanation_score", descending=True, limit=SHOWN,
    )  # fmt: skip
    return {
        "path": str(store.path),
        "generation": store.generation,
        "provider": config.provider,
        "model": config.model,
        **summary(store, config.provider, shown_name(config.model) if config.model else ""),
        "best": best.to_dict("records"),
    }
