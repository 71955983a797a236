"""Harvest: run a model over text once and keep its activations at one or more hooks.

Shapes: B contexts, T = ctx positions, N rows kept, D width of a hook.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from saebench.activations.cache import ActivationCache, open_cache, vocab_bytes
from saebench.activations.forecast import forecast
from saebench.activations.manifest import (
    GRADIENT_PREFIX,
    HOOK_PREFIX,
    LABELS_FILE,
    VOCAB_FILE,
    ColumnType,
    gradient_dtype,
)
from saebench.activations.packing import Batch, batches, pack
from saebench.activations.settings import HarvestConfig
from saebench.activations.shards import TORCH_DTYPES
from saebench.activations.writer import CacheWriter, inspect_target
from saebench.core.device import pick_device
from saebench.core.errors import UserError
from saebench.core.files import directory_lock
from saebench.core.prefetch import prefetch
from saebench.core.progress import progress
from saebench.core.settings import accepts_settings
from saebench.sources.models import Model, ModelInfo, load_model, peek_model
from saebench.sources.text import Document, read_documents, text_fingerprint
from saebench.sources.tokenizer import Tokens

_BATCHES_AHEAD = 4


@accepts_settings(HarvestConfig)
def harvest(config: HarvestConfig) -> ActivationCache:
    """Run ``config.model`` over ``config.text`` and write an activation cache to ``config.out``.

    Documents are joined by the end-of-text token and packed into contexts of ``ctx`` tokens, held-out
    documents apart from the others; position 0 of each context is dropped unless ``keep_first``. Harvesting
    ends after ``tokens`` rows (held-out rows included) or with the text. Everything that can be is checked
    before the model is loaded.

    With ``gradients`` the gradient of the model's loss at each row is stored beside it (`Model.gradients`),
    and the last position of each context, which predicts nothing, is no row.

    >>> made = sb.harvest(out="made", model="demo", text="sotu", tokens=500, quiet=True)
    >>> made.n_rows, made.d_in()
    (500, 256)

    A killed harvest goes on where it stopped when the same call is made again, and ends with the same bytes
    as one left in peace; a finished one is opened as it is. The model computes in float32 on a CPU and in
    the stored type on a GPU (in float32 where that is fp16 and gradients are asked for).

    Raises:
        UserError: an unknown model, text, hook or device, a context longer than the model's, a hook with NaN
            or infinite activations or gradients, a full disk or GPU, or an ``out`` that holds something else.
    """
    info = peek_model(config.model, revision=config.revision)
    for hook in config.hook:
        info.check_hook(hook)
    device = pick_device(config.device)
    fp16_gradients = config.gradients and config.dtype == "fp16"  # they underflow on their way back
    compute = "fp32" if device.type == "cpu" or fp16_gradients else config.dtype
    tokens = Tokens(info)
    bos = _bos(config, info, tokens)
    if info.n_ctx is not None and config.ctx > info.n_ctx:
        raise UserError(
            f"--ctx is {config.ctx} but {info.name} reads at most {info.n_ctx} tokens; lower --ctx"
        )
    identity = {
        "model": {**info.to_json(), "dtype": compute, "device": device.type},
        "text": text_fingerprint(config.text, column=config.column, split=config.split),
        "settings": {
            "hook": list(config.hook),
            "tokens": config.tokens,
            "ctx": config.ctx,
            "dtype": config.dtype,
            "batch_size": config.batch_size,
            "keep_first": config.keep_first,
            "bos": bos is not None,
            "shard_rows": config.shard_rows,
            **({"gradients": True} if config.gradients else {}),
        },
    }
    if inspect_target(config.out, identity) == "complete":
        _say(config, f"{config.out} is complete already; nothing to do")
        return open_cache(config.out)
    _say(config, forecast(config, info, device))
    documents = _documents(config)
    with directory_lock(config.out, what="the activation cache"):
        state = inspect_target(config.out, identity)
        if state == "complete":  # another process finished it just now
            return open_cache(config.out)
        model = load_model(config.model, revision=config.revision, device=device, dtype=compute)
        columns = _columns(config, model)
        with CacheWriter(
            config.out,
            kind="harvest",
            hooks=config.hook,
            columns=columns,
            shard_rows=config.shard_rows,
            identity=identity,
        ) as writer:
            if state == "unfinished":
                _say(config, f"resuming {config.out} at row {writer.rows.keeps:,}")
            labels = _write_rows(config, model, tokens, bos, documents, writer)
            files = {VOCAB_FILE: vocab_bytes(tokens.bytes())}
            if any(labels):
                files[LABELS_FILE] = (json.dumps(labels, ensure_ascii=False) + "\n").encode()
            writer.finish(files)
    cache = open_cache(config.out)
    _warn_of_shortage(config, cache)
    return cache


def _write_rows(
    config: HarvestConfig,
    model: Model,
    tokens: Tokens,
    bos: int | None,
    documents: Iterator[Document],
    writer: CacheWriter,
) -> list[str]:
    """Feed the text through the model into the writer; returns the labels of the documents used.

    Batches whose rows are on disk already are counted without running the model. One batch computes on a
    GPU while the one before is stored.
    """
    labels: list[str] = []
    last_document = -1
    kept = writer.rows.keeps
    batches_ahead = prefetch(_batches(config, tokens, bos, documents, labels), _BATCHES_AHEAD)
    with (
        contextlib.closing(batches_ahead) as made,
        progress("harvest", total=config.tokens, unit="tok", initial=kept, quiet=config.quiet) as bar,
    ):
        pending: tuple[Batch, dict[str, Tensor]] | None = None
        for batch in made:
            last_document = max(last_document, *(int(context.docs.max()) for context in batch.contexts))
            first_context = writer.contexts.position
            writer.contexts.append(_context_columns(batch))
            if writer.rows.position + batch.n_rows <= kept:
                writer.rows.skip(batch.n_rows)
                continue
            computed = _compute(config, model, batch)
            if pending is not None:
                _store(config, writer, *pending)
                bar.update(pending[0].n_rows)
            pending = batch, {**computed, **_row_columns(batch, first_context)}
        if pending is not None:
            _store(config, writer, *pending)
            bar.update(pending[0].n_rows)
    if writer.rows.position == 0:
        raise UserError(f"--text {config.text} is too short: it has no token after the first; give more text")
    return labels[: last_document + 1]


def _documents(config: HarvestConfig) -> Iterator[Document]:
    """The documents of the text, the first one read at once: no model is loaded for a text without any."""
    documents = read_documents(config.text, column=config.column, split=config.split)
    return itertools.chain([next(documents)], documents)


def _batches(
    config: HarvestConfig, tokens: Tokens, bos: int | None, documents: Iterator[Document], labels: list[str]
) -> Iterator[Batch]:
    def labeled() -> Iterator[Document]:
        for document in documents:
            labels.append(document.label)
            yield document

    contexts = pack(labeled(), tokens.encode, ctx=config.ctx, separator=tokens.separator, bos=bos)
    return batches(
        contexts,
        ctx=config.ctx,
        batch_size=config.batch_size,
        keep_first=config.keep_first,
        keep_last=not config.gradients,
        max_rows=config.tokens,
    )


def _compute(config: HarvestConfig, model: Model, batch: Batch) -> dict[str, Tensor]:
    """Columns [N, D] of every hook in the types they are stored in, still on the model's device."""
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
        for name, dtype in _stored_types(config).items()
    }


def _stored_types(config: HarvestConfig) -> dict[str, str]:
    """The columns of activations, then of gradients, and the type of each."""
    types = {HOOK_PREFIX + hook: str(config.dtype) for hook in config.hook}
    if config.gradients:
        types |= {GRADIENT_PREFIX + hook: gradient_dtype(config.dtype) for hook in config.hook}
    return types


def _store(config: HarvestConfig, writer: CacheWriter, batch: Batch, rows: Mapping[str, Tensor]) -> None:
    here = {name: column.cpu() for name, column in rows.items()}
    for name in _stored_types(config):
        _require_finite(config, name, here[name], here["ctx"], here["pos"])
    writer.rows.append(here)


def _require_finite(config: HarvestConfig, name: str, rows_ND: Tensor, ctx_N: Tensor, pos_N: Tensor) -> None:
    bad_N = ~torch.isfinite(rows_ND).all(dim=1)
    if bad_N.any():
        row = int(bad_N.nonzero()[0])
        kind, _, hook = name.partition("/")
        way_out = "try --dtype fp32" if config.dtype != "fp32" else "the model itself computes them"
        raise UserError(
            f"{'gradients' if kind == 'gradient' else 'activations'} at {hook} hold NaN or infinity "
            f"(context {int(ctx_N[row])}, position {int(pos_N[row])}); {way_out}"
        )


def _row_columns(batch: Batch, first_context: int) -> dict[str, Tensor]:
    """The columns beside the activations, [N] each."""
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


def _context_columns(batch: Batch) -> dict[str, Tensor]:
    lengths = [len(context) for context in batch.contexts]
    return {
        "context_tokens": torch.from_numpy(batch.tokens_BT),
        "context_len": torch.tensor(lengths, dtype=torch.int32),
    }


def _columns(config: HarvestConfig, model: Model) -> dict[str, ColumnType]:
    widths = {hook: model.hook_dim(hook) for hook in config.hook}
    values = {
        name: ColumnType(dtype, (widths[name.partition("/")[2]],))
        for name, dtype in _stored_types(config).items()
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


def _bos(config: HarvestConfig, info: ModelInfo, tokens: Tokens) -> int | None:
    """The token with which every context begins, or None."""
    if config.bos == "never" or (config.bos == "auto" and not tokens.adds_bos()):
        return None
    if tokens.bos is None:
        raise UserError(f"--bos always: the tokenizer of {info.name} has no BOS token; use --bos never")
    return tokens.bos


def _warn_of_shortage(config: HarvestConfig, cache: ActivationCache) -> None:
    if cache.n_rows < config.tokens:
        print(
            f"warning: the text ended after {cache.n_rows:,} rows of the {config.tokens:,} asked for",
            file=sys.stderr,
        )
    held_out = int(cache.held_out.sum())
    if held_out in (0, cache.n_rows):
        some = "none" if held_out == 0 else "all"
        print(
            f"warning: {some} of the {cache.n_rows:,} rows are held out (1 document in 20 is); "
            "harvest more documents before training or evaluating on this cache",
            file=sys.stderr,
        )


def _say(config: HarvestConfig, text: str) -> None:
    if not config.quiet:
        print(text, file=sys.stderr)
