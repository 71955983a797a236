"""SaeReader: data of the SAE as a whole, such as what was indexed and the metrics of its training."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from saebench.store.connection import StoreConnection

if TYPE_CHECKING:
    import pandas as pd


def with_sites(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A meta table with the keys sites, targets and skip, which that of an SAE of one site leaves out."""
    one = [{"name": meta["hook_name"], "width": meta["d_in"]}]
    return {"sites": one, "targets": one, "skip": False, **meta}


def sites_text(info: Mapping[str, Any]) -> str:
    """The sites of `SaeReader.info` in one line: 'A', 'A, B', or 'A → B' for a transcoder."""
    read, written = (", ".join(site["name"] for site in info[key]) for key in ("sites", "targets"))
    return read if read == written else f"{read} → {written}"


class SaeReader:
    """Owns the tables meta and train_metric."""

    def __init__(self, connection: StoreConnection) -> None:
        self._connection = connection

    def info(self) -> dict[str, Any]:
        """Metadata: what was indexed, with its numbers of tokens, activations and latents.

        Keys: name, sae (architecture), d_in, d_sae, k, hook_name, model, modality, text, n_tokens,
        n_contexts, n_documents, n_activations, n_dead, n_dense, eval (the run's eval.json or None), missing
        (table -> why it is absent, one sentence), sae_hash, cache_hash, generation, sites and targets (what
        is read and what is reconstructed, lists of {name, width}; for an SAE both are its hook), skip
        (whether a transcoder has a skip connection). hook_name is the first site. A crosscoder also has
        site_std, the standard deviation of the rows of each site. If the cache has several models, models
        are their names: site '1:S' is S of the second.

        >>> store.info()["sae"]
        'topk'
        """
        dead, dense = self._n_dead_and_dense
        generation = self._connection.manifest.generation
        of_index = with_sites(self._connection.meta)
        return {**of_index, "n_dead": dead, "n_dense": dense, "generation": generation}

    @functools.cached_property
    def _n_dead_and_dense(self) -> tuple[int, int]:
        """Counted once: a generation does not change."""
        query = "SELECT count(*) FILTER (dead), count(*) FILTER (dense) FROM sae.feature"
        dead, dense = self._connection.rows(query)[0]
        return int(dead), int(dense)

    def train_metrics(self) -> pd.DataFrame:
        """The metrics of the training run, one row per value. Columns step, name, value.

        Raises:
            UserError: a store without them; the sentence says why.
        """
        self._connection.require("train_metric")
        return self._connection.frame("SELECT step, name, value FROM sae.train_metric ORDER BY step, name")

    def metrics_wide(self) -> pd.DataFrame:
        """The metrics of the training run, one row per reported step and one column per metric.

        >>> store.metrics_wide()["step"].is_monotonic_increasing
        True

        Raises:
            UserError: a store without them; the sentence says why.
        """
        wide = self.train_metrics().pivot(index="step", columns="name", values="value")
        return wide.rename_axis(columns=None).reset_index()
