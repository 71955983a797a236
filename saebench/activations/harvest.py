"""harvest: run a model over a text once and write its activations at one or more hooks to a cache.

Shapes: B contexts, T = ctx positions, N rows kept, D width of a hook.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Iterator, Mapping

from torch import Tensor

from saebench.activations.batch_columns import (
    activation_columns,
    column_types,
    context_columns,
    require_finite,
    row_columns,
    stored_types,
)
from saebench.activations.cache import ActivationCache, open_cache, vocab_bytes
from saebench.activations.forecast import forecast
from saebench.activations.manifest import (
    LABELS_FILE,
    VOCAB_FILE,
)
from saebench.activations.packing import ContextBatch, batches, pack
from saebench.activations.settings import HarvestConfig
from saebench.activations.writer import CacheWriter, inspect_target
from saebench.core.device import pick_device
from saebench.core.errors import UserError
from saebench.core.files import directory_lock
from saebench.core.prefetch import prefetch
from saebench.core.progress import progress
from saebench.core.settings import accepts_settings
from saebench.sources.models import Model, ModelInfo, load_model, peek_model
from saebench.sources.text import Document, read_documents, text_fingerprint
from saebench.sources.tokenizer import ModelTokenizer

_BATCHES_AHEAD = 4


@accepts_settings(HarvestConfig)
def harvest(config: HarvestConfig) -> ActivationCache:
    """Run ``config.model`` over ``config.text`` and write an activation cache to ``config.out``.

    Documents are joined by the end-of-text token and packed into contexts of ``ctx`` tokens; held-out
    documents have contexts of their own. Position 0 of each context is dropped unless ``keep_first``. The
    harvest ends after ``tokens`` rows (held-out rows included) or at the end of the text. Settings are
    checked before the model is loaded where that is possible.

    With ``gradients`` the cache also has the gradient of the model's loss at each row (`Model.gradients`).
    The last position of each context predicts nothing and then has no row.

    >>> made = sb.harvest(out="made", model="demo", text="sotu", tokens=500, quiet=True)
    >>> made.n_rows, made.d_in()
    (500, 256)

    After a harvest was killed, the same call resumes it, and the result has the same bytes as without the
    interruption. If the cache is complete already, it is opened. The model computes in float32 on a CPU and
    in the stored type on a GPU (in float32 for fp16 with gradients).

    Raises:
        UserError: an unknown model, text, hook or device, contexts longer than the model reads, NaN or
            infinite activations or gradients, a full disk or GPU, or an ``out`` that holds something else.
    """
    info = peek_model(config.model, revision=config.revision)
    for hook in config.hook:
        info.check_hook(hook)
    device = pick_device(config.device)
    fp16_gradients = config.gradients and config.dtype == "fp16"  # they would underflow in the backward pass
    compute = "fp32" if device.type == "cpu" or fp16_gradients else config.dtype
    tokens = ModelTokenizer(info)
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
        if state == "complete":  # another process has finished it in the meantime
            return open_cache(config.out)
        model = load_model(config.model, revision=config.revision, device=device, dtype=compute)
        columns = column_types(config, model)
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
    tokens: ModelTokenizer,
    bos: int | None,
    documents: Iterator[Document],
    writer: CacheWriter,
) -> list[str]:
    """Run the model over the text and append the rows; returns the labels of the documents used.

    Batches whose rows are on disk already are counted without running the model. A GPU computes one batch
    while the previous one is stored.
    """
    labels: list[str] = []
    last_document = -1
    kept = writer.rows.keeps
    batches_ahead = prefetch(_batches(config, tokens, bos, documents, labels), _BATCHES_AHEAD)
    with (
        contextlib.closing(batches_ahead) as made,
        progress("harvest", total=config.tokens, unit="tok", initial=kept, quiet=config.quiet) as bar,
    ):
        pending: tuple[ContextBatch, dict[str, Tensor]] | None = None
        for batch in made:
            last_document = max(last_document, *(int(context.docs.max()) for context in batch.contexts))
            first_context = writer.contexts.position
            writer.contexts.append(context_columns(batch))
            if writer.rows.position + batch.n_rows <= kept:
                writer.rows.skip(batch.n_rows)
                continue
            computed = activation_columns(config, model, batch)
            if pending is not None:
                _store(config, writer, *pending)
                bar.update(pending[0].n_rows)
            pending = batch, {**computed, **row_columns(batch, first_context)}
        if pending is not None:
            _store(config, writer, *pending)
            bar.update(pending[0].n_rows)
    if writer.rows.position == 0:
        raise UserError(
            f"--text {config.text} is too short: it has no token after position 0; give more text"
        )
    return labels[: last_document + 1]


def _documents(config: HarvestConfig) -> Iterator[Document]:
    """The documents; the first one is read at once, so that an empty text fails before the model loads."""
    documents = read_documents(config.text, column=config.column, split=config.split)
    return itertools.chain([next(documents)], documents)


def _batches(
    config: HarvestConfig,
    tokens: ModelTokenizer,
    bos: int | None,
    documents: Iterator[Document],
    labels: list[str],
) -> Iterator[ContextBatch]:
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


def _store(
    config: HarvestConfig, writer: CacheWriter, batch: ContextBatch, rows: Mapping[str, Tensor]
) -> None:
    here = {name: column.cpu() for name, column in rows.items()}
    for name in stored_types(config):
        require_finite(config, name, here[name], here["ctx"], here["pos"])
    writer.rows.append(here)


def _bos(config: HarvestConfig, info: ModelInfo, tokens: ModelTokenizer) -> int | None:
    """The BOS token id that begins every context, or None."""
    if config.bos == "never" or (config.bos == "auto" and not tokens.adds_bos()):
        return None
    if tokens.bos is None:
        raise UserError(f"--bos always: the tokenizer of {info.name} has no BOS token; use --bos never")
    return tokens.bos


def _warn_of_shortage(config: HarvestConfig, cache: ActivationCache) -> None:
    if cache.n_rows < config.tokens:
        print(
            f"warning: the text ended after {cache.n_rows:,} of the {config.tokens:,} rows of --tokens",
            file=sys.stderr,
        )
    held_out = int(cache.held_out.sum())
    if held_out in (0, cache.n_rows):
        some = "none" if held_out == 0 else "all"
        print(
            f"warning: {some} of the {cache.n_rows:,} rows are held out (about 1 document in 20 is); "
            "harvest more documents before training or evaluating on this cache",
            file=sys.stderr,
        )


def _say(config: HarvestConfig, text: str) -> None:
    if not config.quiet:
        print(text, file=sys.stderr)
