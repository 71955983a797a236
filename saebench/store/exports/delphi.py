"""Export of the latent cache of delphi (EleutherAI), which its explainers and scorers read.

    OUT/<hook>/<first>_<last>.safetensors    locations [n, 3], activations [n] fp16, tokens [contexts, ctx]
    OUT/<hook>/config.json

A row of ``locations`` is (context, position, latent - first), uint16 where all fit and else uint32. Like
delphi, activations of size 1e-5 and less are left out. Give delphi OUT as ``raw_dir``.
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from saebench.core.errors import UserError
from saebench.core.files import write_json_atomic
from saebench.store.scan import read_contexts

if TYPE_CHECKING:
    from saebench.store.query import FeatureStore

SMALLEST = 1e-5
PER_SPLIT = 8_000_000
"""Activations in a file, about: delphi loads one at a time."""
SPLITS = 5


def check(store: FeatureStore, features: list[int] | None) -> None:
    store.require("context")
    largest = np.finfo(np.float16).max
    worst = store.features(
        ["feature", "max_act"], among=features, order_by="max_act", descending=True, limit=1
    )
    if len(worst) and worst["max_act"][0] > largest:
        raise UserError(
            f"feature {worst['feature'][0]} reaches {worst['max_act'][0]:g}, and delphi keeps activations as "
            f"fp16, up to {largest:g}; leave it out with --features"
        )


def write(store: FeatureStore, features: list[int] | None, directory: Path) -> tuple[str, ...]:
    from safetensors.numpy import save_file

    info = store.info()
    folder = directory / module_name(info["hook_name"])
    folder.mkdir()
    tokens, lengths = _tokens(store)
    n_splits = min(info["d_sae"], max(SPLITS, math.ceil(info["n_activations"] / PER_SPLIT)))
    edges = [info["d_sae"] * i // n_splits for i in range(n_splits + 1)]
    for first, end in itertools.pairwise(edges):
        locations, activations = _activations(store, features, first, end)
        fits = max(len(tokens), tokens.shape[1], end - first) <= 2**16
        save_file(
            {
                "locations": locations.astype(np.uint16 if fits else np.uint32),
                "activations": activations.astype(np.float16),
                "tokens": tokens,
            },
            folder / f"{first}_{end - 1}.safetensors",
        )
    ctx_len = tokens.shape[1]
    write_json_atomic(
        folder / "config.json",
        {
            "model_name": info["model"],
            "dataset_repo": info["text"],
            "dataset_split": "",
            "dataset_name": "",
            "dataset_row": "",
            "dataset_column": "",
            "batch_size": 32,
            "ctx_len": ctx_len,
            "cache_ctx_len": ctx_len,
            "n_tokens": int(tokens.size),
            "n_splits": n_splits,
        },
    )
    notes = ["delphi takes its tokenizer from model_name in config.json; change it to where yours is."]
    if lengths.min() != lengths.max():
        notes.append(f"Contexts shorter than {ctx_len} tokens end in token 0, which delphi takes for text.")
    return tuple(notes)


def module_name(hook: str) -> str:
    """The name of the folder: the hook, without characters that a path must not have."""
    return re.sub(r"[^\w.-]", "_", hook).lstrip(".") or "hook"


def _tokens(store: FeatureStore) -> tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.int64]]:
    """``(tokens, lengths)``: [contexts, longest], uint16 where the vocabulary fits, and [contexts]."""
    tokens_X, _, lengths = read_contexts(store)
    dtype = np.uint16 if len(store.vocab) <= 2**16 else np.uint32
    tokens = np.zeros((len(lengths), lengths.max()), dtype=dtype)
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = tokens_X
    return tokens, lengths


def _activations(store: FeatureStore, features: list[int] | None, first: int, end: int) -> tuple[Any, Any]:
    """locations [n, 3] int64 and activations [n] fp32 of the latents from ``first`` to before ``end``."""
    query = "SELECT ctx, pos, feature, value FROM sae.act WHERE feature BETWEEN ? AND ? AND abs(value) > ?"
    values: list[object] = [first, end - 1, SMALLEST]
    if features is not None:
        query += " AND feature IN (SELECT unnest(?::UBIGINT[]))"
        values.append(features)
    found = store.arrow(query, values)
    ctx, pos, feature = (found[name].to_numpy().astype(np.int64) for name in ("ctx", "pos", "feature"))
    return np.stack([ctx, pos, feature - first], axis=1), found["value"].to_numpy()
