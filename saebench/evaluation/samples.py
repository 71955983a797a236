"""Choice of the rows and contexts to measure on; the same settings always choose the same ones.

Shapes: N rows, D = d_in, C contexts, T positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saebench.core.errors import UserError
from saebench.evaluation.faithfulness import Contexts
from saebench.runs.provenance import ContextSettings

if TYPE_CHECKING:
    from saebench.activations.cache import ActivationCache
    from saebench.evaluation.settings import EvalConfig
    from saebench.sources.models import Model

DEFAULT_CTX = 128
"""Length of contexts if the run and the cache do not record it."""
MEAN_ROWS = 2**20
"""Number of training rows over which the mean activation is taken."""
SCANNED_ROWS = 2**22
"""Rows of a cache whose ``held_out`` flags are scanned at once."""


def choose_rows(cache: ActivationCache, *, rows: str, tokens: int) -> Tensor:
    """Row numbers int64 [N]: the first ``tokens`` held-out rows, or of all rows when ``rows`` is 'all'.

    Raises:
        UserError: the cache has no held-out rows. Training rows are used only with ``rows="all"``.
    """
    if rows == "all":
        return torch.arange(min(cache.n_rows, tokens))
    row_N = first_rows(cache.held_out, True, limit=tokens)
    if len(row_N) == 0:
        raise UserError(
            f"none of the {cache.n_rows:,} rows of {cache.path} is held out from training; evaluate on a "
            "cache with more documents, or add --rows all to measure on rows that the SAE may have seen"
        )
    return row_N


def first_rows(held_out_N: Tensor, wanted: bool, *, limit: int, piece: int = SCANNED_ROWS) -> Tensor:
    """The first ``limit`` row numbers, int64, at which ``held_out_N`` bool [N] is ``wanted``.

    The flags are scanned in pieces and no further than needed, because the numbers of all rows of a large
    cache would take gigabytes.
    """
    found, n_found = [torch.empty(0, dtype=torch.int64)], 0
    for start in range(0, len(held_out_N), piece):
        found.append((held_out_N[start : start + piece] == wanted).nonzero()[:, 0] + start)
        n_found += len(found[-1])
        if n_found >= limit:
            break
    return torch.cat(found)[:limit]


def row_batches(cache: ActivationCache, hook: str, row_N: Tensor, *, size: int) -> Iterator[Tensor]:
    """The activations [n, d_in] of the rows ``row_N``, ``size`` at a time, in order."""
    activations = cache.verified(hook)
    for part in torch.split(row_N, size):
        yield activations[part]


def cache_contexts(cache: ActivationCache, row_N: Tensor) -> Contexts:
    """The contexts that contain these rows; exactly the positions of the rows are kept.

    Raises:
        UserError: the cache was imported from an array and has no tokens.
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


def text_contexts(
    config: EvalConfig, model: Model, made: ContextSettings | None, *, keep_last: bool = True
) -> Contexts:
    """The first contexts of the held-out documents of ``config.text``; ``config.tokens`` positions are kept.

    ``made`` gives the length of contexts, BOS, and which positions are rows. By default, contexts have 128
    tokens, begin with BOS if the tokenizer adds it, and position 0 is not a row. Without ``keep_last``, the
    last position of each context, which has no next token, is not a row either.

    Raises:
        UserError: no document of the text is held out.
    """
    from saebench.activations.packing import batches, pack
    from saebench.sources.text import read_documents

    assert config.text is not None
    made = made or ContextSettings()
    ctx = min(made.ctx or DEFAULT_CTX, model.info.n_ctx or made.ctx or DEFAULT_CTX)
    bos = model.tokens.adds_bos() if made.bos is None else made.bos
    documents = read_documents(
        config.text, column=config.column, split=config.split, config=config.text_config
    )
    chosen = (d for d in documents if config.rows == "all" or d.held_out)
    packed = pack(chosen, model.tokens.encode_document, ctx=ctx, bos=model.tokens.bos if bos else None)
    # One more context than needed, so that the last context is complete, as in a cache.
    max_rows = config.tokens + ctx
    made_batches = batches(
        packed,
        ctx=ctx,
        batch_size=1024,
        keep_first=bool(made.keep_first),
        keep_last=keep_last and made.keep_last,
        max_rows=max_rows,
        exclude=made.exclude_tokens,
    )
    found = list(made_batches)
    if not found:
        raise UserError(
            f"no document of --text {config.text} is held out from training (one in 20 is); give a text of "
            "more documents, or add --rows all to read those that the SAE may have seen"
        )
    tokens_CT = torch.cat([torch.from_numpy(batch.tokens_BT) for batch in found])
    length_C = torch.tensor([len(context) for batch in found for context in batch.contexts])
    keep_CT = torch.cat([torch.from_numpy(batch.keep_BT) for batch in found])
    if made.max_norms:
        keep_CT &= _below_max_norms(model, tokens_CT, made.max_norms, size=config.batch_size)
    row_N, position_N = keep_CT.nonzero(as_tuple=True)
    if not len(row_N):
        raise UserError(
            f"every position of --text {config.text} is above the norms that the cache was made with; give "
            "another text"
        )
    keep_CT[row_N[config.tokens :], position_N[config.tokens :]] = False
    used = int(row_N[: config.tokens][-1]) + 1
    return Contexts(tokens_CT[:used], length_C[:used], keep_CT[:used])


def _below_max_norms(model: Model, tokens_CT: Tensor, limits: Mapping[str, float], *, size: int) -> Tensor:
    """Bool [C, T]: the positions whose activations are within the norms ``limits`` of a harvest."""
    below = []
    for tokens_BT in torch.split(tokens_CT, size):
        found = model.run_to(tokens_BT, list(limits))
        norms = {hook: torch.linalg.vector_norm(x_BTD.float(), dim=-1) for hook, x_BTD in found.items()}
        below.append(torch.stack([norms[hook] <= limit for hook, limit in limits.items()]).all(dim=0).cpu())
    return torch.cat(below)


def mean_over_contexts(model: Model, hook: str, batches: Iterable[Contexts]) -> Tensor:
    """[d_in] float32, the mean activation at the kept positions."""
    total_D, n_rows = torch.zeros(model.hook_dim(hook), dtype=torch.float64), 0
    for batch in batches:
        x_BTD = model.run_to(batch.tokens_BT, [hook])[hook].cpu()
        total_D += x_BTD[batch.keep_BT].double().sum(0)
        n_rows += int(batch.keep_BT.sum())
    return (total_D / n_rows).float()


def mean_training_activation(cache: ActivationCache, hook: str, *, size: int = 8192) -> Tensor | None:
    """[d_in] float32, the mean of the first ``MEAN_ROWS`` rows that are not held out; None without any.

    Raises:
        UserError: one of them is NaN or infinite.
    """
    row_N = first_rows(cache.held_out, False, limit=MEAN_ROWS)
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
