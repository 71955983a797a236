"""Reading whole columns of a store as arrays, for computations over all of its text or activations.

Shapes: C contexts, X tokens of all contexts, S activations of a range of features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from saebench.store.query import FeatureStore


def read_contexts(store: FeatureStore) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
    """``(tokens_X, docs_X, length_C)``: all contexts end to end, in order, and the length of each.

    Raises:
        UserError: the store has no contexts.
    """
    store.require("context")
    table = store.arrow("SELECT n_tokens, tokens, docs FROM txt.context ORDER BY ctx")

    def flat(name: str) -> NDArray[np.int32]:
        parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table[name].chunks]
        return np.concatenate([np.empty(0, np.int32), *parts]).astype(np.int32)

    return flat("tokens"), flat("docs"), table["n_tokens"].to_numpy().astype(np.int64)


def read_token_counts(store: FeatureStore) -> NDArray[np.int64]:
    """[V]: in how many rows of the cache each token stands."""
    store.require("token")
    table = store.arrow("SELECT n FROM txt.token ORDER BY token")
    counts: NDArray[np.int64] = table["n"].to_numpy().astype(np.int64)
    return counts


def read_activations(
    store: FeatureStore, first: int, stop: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """``(feature_S, ctx_S, pos_S, value_S)`` of the features ``first`` to ``stop - 1``, sorted."""
    table = store.arrow(
        "SELECT feature, ctx, pos, value FROM sae.act WHERE feature >= ? AND feature < ?", [first, stop]
    )
    columns: list[Any] = [table[name].to_numpy().astype(np.int64) for name in ("feature", "ctx", "pos")]
    return columns[0], columns[1], columns[2], table["value"].to_numpy()
