"""Export of Neuronpedia's JSON, with the keys that SAEDashboard writes and Neuronpedia's importer reads.

    OUT/batch-0.json, batch-1.json, ...    128 features each

Keys that a store has no data for (the neurons that a feature aligns with, the histogram of its logits) are
empty lists. ``frac_nonzero`` is exact; SAEDashboard reads it from the title of a chart.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.core.files import write_json_atomic
from saebench.store.schema import DECILES

if TYPE_CHECKING:
    from saebench.store.query import FeatureStore

PER_BATCH = 128
SHOWN_NEIGHBORS = 10


def check(store: FeatureStore, features: list[int] | None) -> None:
    store.require("context")
    store.require("logit")


def write(store: FeatureStore, features: list[int] | None, directory: Path) -> tuple[str, ...]:
    info = store.info()
    ctx_len = store.arrow("SELECT max(n_tokens) AS longest FROM txt.context")["longest"][0].as_py()
    wanted = range(info["d_sae"]) if features is None else features
    for number, start in enumerate(range(0, len(wanted), PER_BATCH)):
        write_json_atomic(
            directory / f"batch-{number}.json",
            {
                "model_id": info["model"] or "",
                "layer": layer_of(info["hook_name"]),
                "sae_set": store.sae,
                "features": [
                    feature_json(store, feature, info, ctx_len)
                    for feature in wanted[start : start + PER_BATCH]
                ],
            },
        )
    return (
        "What the store does not keep is empty: neuron alignment, correlated neurons, the cosine of "
        "activations, the histogram of logits.",
    )


def layer_of(hook: str) -> int:
    """The layer in the name of a hook such as blocks.2.hook_resid_post; 0 when it has none."""
    match = re.search(r"\.(\d+)\.", hook)
    return int(match[1]) if match else 0


def feature_json(store: FeatureStore, feature: int, info: dict[str, Any], ctx_len: int) -> dict[str, Any]:
    row = store.feature(feature)
    logits = store.logits(feature)
    up, down = (logits[logits["sign"] == sign] for sign in (1, -1))
    bins = store.histogram(feature)
    near = store.neighbors(feature, "correlation").head(SHOWN_NEIGHBORS)
    empty = dict.fromkeys(
        (
            "neuron_alignment_indices",
            "neuron_alignment_values",
            "neuron_alignment_l1",
            "correlated_neurons_indices",
            "correlated_neurons_l1",
            "correlated_neurons_pearson",
            "correlated_features_l1",
            "logits_hist_data_bar_heights",
            "logits_hist_data_bar_values",
            "decoder_weights_dist",
        ),
        (),
    )
    return {
        **empty,
        "feature_index": feature,
        "correlated_features_indices": near["other"].tolist(),
        "correlated_features_pearson": near["score"].tolist(),
        "pos_str": up["text"].tolist(),
        "pos_values": up["value"].tolist(),
        "neg_str": down["text"].tolist(),
        "neg_values": down["value"].tolist(),
        "frac_nonzero": row["density"],
        "freq_hist_data_bar_values": ((bins["lo"] + bins["hi"]) / 2).tolist(),
        "freq_hist_data_bar_heights": bins["count"].tolist(),
        "n_prompts_total": info["n_contexts"],
        "n_tokens_in_prompt": ctx_len,
        "dataset": info["text"] or "",
        "activations": _activations(store, feature, row),
    }


def _activations(store: FeatureStore, feature: int, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Examples with firings, by the interval of their group; top examples have the interval -1."""
    intervals = {"top": (-1.0, row["max_act"], -1.0), **_deciles(store, feature)}
    examples = store.examples(feature)
    return [
        {
            "bin_min": interval[0],
            "bin_max": interval[1],
            "bin_contains": interval[2],
            "tokens": example.pieces,
            "values": example.acts,
        }
        for group, interval in intervals.items()
        for example in examples[examples["group"] == group].itertuples()
    ]


def _deciles(store: FeatureStore, feature: int) -> dict[str, tuple[float, float, float]]:
    """Group -> its smallest and largest activation, and its fraction of the firings."""
    acts = sorted(store.activations(feature)["value"].tolist())
    n, found = len(acts), {}
    for before, decile in enumerate(DECILES):
        low, high = -(-before * n // 10), -(-(before + 1) * n // 10)
        if low < high:
            found[f"decile-{decile}"] = (acts[low], acts[high - 1], (high - low) / n)
    return dict(reversed(found.items()))
