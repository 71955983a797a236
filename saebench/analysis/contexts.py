"""draw_contexts: a random sample of the contexts of a cache, for running the model on them again.

Shapes: T positions of one context, C contexts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saebench.core.errors import UserError

if TYPE_CHECKING:
    from saebench.activations.cache import ActivationCache


@dataclass(frozen=True)
class CacheContext:
    """A context of a cache: its number, its token ids [T], and the positions that have rows in the cache."""

    ctx: int
    ids_T: Tensor
    positions: Tensor


def draw_contexts(cache: ActivationCache, n: int, *, rows: str, seed: int) -> list[CacheContext]:
    """The first ``n`` contexts of a random order of all contexts, or of the held-out ones.

    Raises:
        UserError: a cache without contexts, or without held-out ones.
    """
    if cache.ctx is None or cache.pos is None or cache.context_tokens is None or cache.context_len is None:
        raise UserError(
            f"{cache.path} was imported without tokens, so a model cannot read its contexts; "
            "give a cache that was harvested"
        )
    order_C = torch.randperm(cache.n_contexts, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    starts_C = torch.searchsorted(cache.ctx, order_C)  # rows are in the order of their contexts
    ends_C = torch.searchsorted(cache.ctx, order_C, right=True)
    has_rows_C = ends_C > starts_C
    if rows == "held-out":
        has_rows_C &= cache.held_out[starts_C.clamp_max(cache.n_rows - 1)]
    chosen = has_rows_C.nonzero()[:n, 0].tolist()
    if not chosen:
        raise UserError(
            f"none of the {cache.n_contexts:,} contexts of {cache.path} is held out from training; give a "
            "cache of more documents, or rows='all' (--rows all)"
        )
    return [
        CacheContext(
            ctx := int(order_C[i]),
            cache.context_tokens[ctx, : int(cache.context_len[ctx])].long(),
            cache.pos[starts_C[i] : ends_C[i]].long(),
        )
        for i in chosen
    ]
