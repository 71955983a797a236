"""The columns of a harvested cache: their types, and the rows that one batch of contexts adds to them.

Shapes: B contexts, T = ctx positions, N rows kept, D width of a hook.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from saebench.activations.manifest import GRADIENT_PREFIX, HOOK_PREFIX, ColumnType, gradient_dtype
from saebench.activations.packing import ContextBatch
from saebench.activations.settings import HarvestConfig
from saebench.activations.shards import TORCH_DTYPES
from saebench.core.errors import UserError
from saebench.sources.models import Model


def stored_types(config: HarvestConfig) -> dict[str, str]:
    """The columns of activations and gradients, with the type that each is stored in."""
    types = {HOOK_PREFIX + hook: str(config.dtype) for hook in config.hook}
    if config.gradients:
        types |= {GRADIENT_PREFIX + hook: gradient_dtype(config.dtype) for hook in config.hook}
    return types


def column_types(config: HarvestConfig, model: Model) -> dict[str, ColumnType]:
    """All columns of the cache and their types."""
    widths = {hook: model.hook_dim(hook) for hook in config.hook}
    values = {
        name: ColumnType(dtype, (widths[name.partition("/")[2]],))
        for name, dtype in stored_types(config).items()
    }
    int32 = ColumnType("int32")
    return {
        **values,
        "token": int32,
        "doc": int32,
        "ctx": int32,
        "pos": int32,
        "held_out": ColumnType("bool"),
        "context_tokens": ColumnType("int32", (config.ctx,)),
        "context_len": int32,
    }


def activation_columns(config: HarvestConfig, model: Model, batch: ContextBatch) -> dict[str, Tensor]:
    """Columns [N, D] of activations and gradients in their stored types, on the model's device."""
    tokens_BT = torch.from_numpy(batch.tokens_BT)
    index_N = torch.from_numpy(np.flatnonzero(batch.keep_BT)).to(model.device)
    gradients: dict[str, Tensor] = {}
    if config.gradients:
        length_B = torch.tensor([len(context) for context in batch.contexts])
        activations, gradients = model.gradients(tokens_BT, length_B, config.hook)
    else:
        activations = model.run_to(tokens_BT, config.hook)
    found = {HOOK_PREFIX + hook: value for hook, value in activations.items()}
    found |= {GRADIENT_PREFIX + hook: value for hook, value in gradients.items()}
    return {
        name: found[name].flatten(0, 1)[index_N].to(TORCH_DTYPES[dtype])
        for name, dtype in stored_types(config).items()
    }


def row_columns(batch: ContextBatch, first_context: int) -> dict[str, Tensor]:
    """The columns token, doc, ctx, pos and held_out, [N] each."""
    docs_BT = np.zeros_like(batch.tokens_BT)
    for row, context in zip(docs_BT, batch.contexts, strict=True):
        row[: len(context)] = context.docs
    b, t = np.nonzero(batch.keep_BT)
    held_out_B = np.array([context.held_out for context in batch.contexts])
    columns = {
        "token": batch.tokens_BT[b, t],
        "doc": docs_BT[b, t],
        "ctx": (b + first_context).astype(np.int32),
        "pos": t.astype(np.int32),
        "held_out": held_out_B[b],
    }
    return {name: torch.from_numpy(column) for name, column in columns.items()}


def context_columns(batch: ContextBatch) -> dict[str, Tensor]:
    """The columns context_tokens [B, T] and context_len [B]."""
    lengths = [len(context) for context in batch.contexts]
    return {
        "context_tokens": torch.from_numpy(batch.tokens_BT),
        "context_len": torch.tensor(lengths, dtype=torch.int32),
    }


def require_finite(config: HarvestConfig, name: str, rows_ND: Tensor, ctx_N: Tensor, pos_N: Tensor) -> None:
    """Raise a UserError when the column ``name`` of a batch holds NaN or infinity."""
    bad_N = ~torch.isfinite(rows_ND).all(dim=1)
    if bad_N.any():
        row = int(bad_N.nonzero()[0])
        kind, _, hook = name.partition("/")
        way_out = "the model computes such values itself, so choose another hook"
        if config.dtype != "fp32":
            way_out = "try --dtype fp32"
        raise UserError(
            f"{'gradients' if kind == 'gradient' else 'activations'} at {hook} hold NaN or infinity "
            f"(context {int(ctx_N[row])}, position {int(pos_N[row])}); {way_out}"
        )
