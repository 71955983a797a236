"""Which rows and contexts to measure on: held-out ones, always the same ones for the same settings.

Shapes: N rows, D = d_in, C contexts, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saebench.errors import UserError
from saebench.evaluation.faithfulness import Contexts
from saebench.files import read_json
from saebench.saes.base import read_description

if TYPE_CHECKING:
    from saebench.activations.cache import ActivationCache

MEAN_ROWS = 2**20
"""Training rows that the mean activation is taken over: more would not change it."""


@dataclass(frozen=True)
class Origin:
    """What an SAE was trained on, as far as its folder says."""

    hook_name: str | None
    cache: Path | None
    model: dict[str, Any] | None


def read_origin(run: Path) -> Origin:
    """From ``sae.json`` and, in a run directory, ``run.json``."""
    facts = read_description(run)
    cache = None
    if (run / "run.json").exists():
        settings = read_json(run / "run.json", what="the run description").get("train", {})
        cache = Path(settings["cache"]) if "cache" in settings else None
    return Origin(facts.get("hook_name"), cache, facts.get("model"))


def choose_rows(cache: ActivationCache, *, rows: str, tokens: int) -> Tensor:
    """Row numbers int64 [N]: the first ``tokens`` held-out rows, or of all rows when ``rows`` is 'all'.

    Raises:
        UserError: the cache has no held-out rows; training rows are never taken unasked.
    """
    if rows == "all":
        return torch.arange(min(cache.n_rows, tokens))
    held_out_N = cache.held_out.nonzero()[:, 0]
    if len(held_out_N) == 0:
        raise UserError(
            f"none of the {cache.n_rows:,} rows of {cache.path} is held out from training; evaluate on a "
            "cache with more documents, or add --rows all to measure on rows that the SAE may have seen"
        )
    return held_out_N[:tokens]


def row_batches(cache: ActivationCache, hook: str, row_N: Tensor, *, size: int) -> Iterator[Tensor]:
    """The activations [n, d_in] of those rows, ``size`` at a time, in order."""
    activations_ND = cache.activations(hook)
    for part in torch.split(row_N, size):
        yield activations_ND[part]


def cache_contexts(cache: ActivationCache, row_N: Tensor) -> Contexts:
    """The contexts in which these rows were read; exactly the positions of the rows are kept.

    Raises:
        UserError: the cache is an import, which has no tokens.
    """
    if cache.ctx is None or cache.pos is None or cache.context_tokens is None or cache.context_len is None:
        raise UserError(
            f"{cache.path} was imported without tokens, so a model cannot read its contexts; "
            "leave --model out, or name a text with --text"
        )
    ctx_C, which_N = torch.unique(cache.ctx[row_N].long(), return_inverse=True)
    tokens_CT = cache.context_tokens[ctx_C]
    keep_CT = torch.zeros(tokens_CT.shape, dtype=torch.bool)
    keep_CT[which_N, cache.pos[row_N].long()] = True
    return Contexts(tokens_CT, cache.context_len[ctx_C], keep_CT)


def mean_training_activation(cache: ActivationCache, hook: str, *, size: int = 8192) -> Tensor | None:
    """[d_in] float32, the mean of the first ``MEAN_ROWS`` rows that are not held out; None without any.

    Raises:
        UserError: one of them is NaN or infinite.
    """
    row_N = (~cache.held_out).nonzero()[:MEAN_ROWS, 0]
    if len(row_N) == 0:
        return None
    total_D = torch.zeros(cache.d_in(hook), dtype=torch.float64)
    for rows_ND in row_batches(cache, hook, row_N, size=size):
        total_D += rows_ND.double().sum(0)
    if not total_D.isfinite().all():
        raise UserError(
            f"training rows of {cache.path} at {hook} hold NaN or infinity; harvest again in bf16 or fp32"
        )
    return (total_D / len(row_N)).float()
