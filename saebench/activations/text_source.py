"""TextSource: a language model over a text, as an ActivationSource; and its harvest.

Shapes: B contexts, T = ctx positions, N rows kept, D width of a hook.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saebench.activations.cache import ActivationCache, vocab_bytes
from saebench.activations.forecast import forecast
from saebench.activations.manifest import (
    GRADIENT_PREFIX,
    HOOK_PREFIX,
    LABELS_FILE,
    VOCAB_FILE,
    gradient_dtype,
)
from saebench.activations.max_norm import REASON
from saebench.activations.packing import ContextBatch, batches, pack
from saebench.activations.settings import HarvestConfig
from saebench.activations.writing import Target, split_column, warn_of_held_out, write_cache
from saebench.core.device import pick_device
from saebench.core.errors import UserError
from saebench.core.settings import accepts_settings
from saebench.sources.base import ColumnType, Site, UnitBatch
from saebench.sources.encoder import Encoder, check_encoder_site, is_encoder
from saebench.sources.modality import TEXT
from saebench.sources.models import Model, ModelInfo, load_model, peek_model
from saebench.sources.text import Document, read_documents, text_fingerprint
from saebench.sources.tokenizer import ModelTokenizer, open_tokenizer

_LEFT_OUT = {
    "null_rows": "warning: {} null rows were left out",
    "excluded_tokens": "{} positions with excluded tokens were left out",
    REASON: "{} rows above --max-norm were left out",
}


@accepts_settings(HarvestConfig)
def harvest(config: HarvestConfig) -> ActivationCache:
    """Run ``config.model`` over ``config.text`` and write an activation cache to ``config.out``.

    Several models read the same tokens: row i of all sites is the same token. Their sites are named
    ``0:HOOK``, ``1:HOOK``, ... in the order of the models.

    Documents are joined by the end-of-text token and packed into contexts of ``ctx`` tokens; held-out
    documents have contexts of their own. Position 0 of each context is dropped unless ``keep_first``. The
    harvest ends after ``tokens`` rows (held-out rows included) or at the end of the text. Settings are
    checked before the model is loaded where that is possible.

    ``source`` is a `ModuleSource`, which takes the place of model and text. It goes with ``out``, ``dtype``,
    ``tokens`` (the most rows, by default all), ``shard_rows`` and ``quiet``.

    With ``gradients`` the cache also has the gradient of the model's loss at each row (`Model.gradients`).
    The last position of each context predicts nothing and then has no row.

    >>> made = sb.harvest(out="made", model="demo", text="sotu", tokens=500, quiet=True)
    >>> made.n_rows, made.d_in()
    (500, 256)

    After a harvest was killed, the same call resumes it, and the result has the same bytes as without the
    interruption. If the cache is complete already, it is opened. The model computes in float32 on a CPU and
    in the stored type on a GPU (in float32 for fp16 with gradients).

    Raises:
        UserError: an unknown model, text, hook or device, contexts longer than the model reads, several
            models with different tokenizers, NaN or
            infinite activations or gradients, a full disk or GPU, or an ``out`` that holds something else.
    """
    source = TextSource(config)
    target = Target(
        out=config.out,
        shard_rows=config.shard_rows,
        quiet=config.quiet,
        total=config.tokens,
        unit="tok",
        max_norm=config.max_norm,
    )
    cache, made = write_cache(source, target)
    if made:
        left_out = cache.manifest.get("left_out", {})
        if cache.n_rows + left_out.get(REASON, 0) < config.tokens:
            print(
                f"warning: the text ended after {cache.n_rows:,} of the {config.tokens:,} rows of --tokens",
                file=sys.stderr,
            )
        asked = {"excluded_tokens": config.exclude_tokens, REASON: config.max_norm is not None}
        left_out = {**{what: 0 for what, given in asked.items() if given}, **left_out}
        for what, count in left_out.items():
            print(_LEFT_OUT[what].format(f"{count:,}"), file=sys.stderr)
        warn_of_held_out(cache, "harvest more documents")
    return cache


TEXT_COLUMNS = {
    **{name: ColumnType("int32") for name in ("token", "doc", "ctx", "pos", "context_len")},
    "held_out": ColumnType("bool"),
}
"""The columns of a text that are neither activations nor as wide as a context."""


class TextSource:
    """The activations of one or several models on ``config.text``.

    Raises:
        UserError: an unknown model, hook or device, contexts longer than a model reads, or models with
            different tokenizers.
    """

    modality = TEXT.name
    kind: Any = "harvest"

    def __init__(self, config: HarvestConfig) -> None:
        self._config = config
        self._infos = [peek_model(name, revision=config.revision) for name in config.model]
        self._encoders = [is_encoder(info) for info in self._infos]
        for (info, encoder), hook in itertools.product(
            zip(self._infos, self._encoders, strict=True), config.hook
        ):
            if encoder:
                check_encoder_site(info, hook)
            else:
                info.check_hook(hook)
        if config.gradients and any(self._encoders):
            raise UserError("--gradients needs a causal language model, whose loss they are of; leave it out")
        self._device = pick_device(config.device)
        fp16_gradients = config.gradients and config.dtype == "fp16"  # they would underflow going backward
        self._compute = "fp32" if self._device.type == "cpu" or fp16_gradients else config.dtype
        tokenizers = [open_tokenizer(info) for info in self._infos]
        self._tokens, *self._others = tokenizers
        for info, other in zip(self._infos[1:], self._others, strict=True):
            require_same_tokens(self._infos[0], self._tokens, info, other)
        self._bos = _bos(config, self._infos[0], self._tokens)
        self._exclude = self._tokens.ids_of(config.exclude_tokens)
        for info in self._infos:
            if info.n_ctx is not None and config.ctx > info.n_ctx:
                raise UserError(
                    f"--ctx is {config.ctx} but {info.name} reads at most {info.n_ctx} tokens; lower --ctx"
                )
        self._labels: list[str] = []
        self._null_rows: list[int] = []
        """For each row without a value, the number of the document after it."""
        self._last_document = -1

    def identity(self) -> dict[str, Any]:
        config = self._config
        models = [self._describe(*model) for model in zip(self._infos, self._encoders, strict=True)]
        return {
            **({"model": models[0]} if len(models) == 1 else {"models": models}),
            "text": text_fingerprint(
                config.text, column=config.column, split=config.split, config=config.text_config
            ),
            "settings": {
                "hook": list(config.hook),
                "tokens": config.tokens,
                "ctx": config.ctx,
                "dtype": config.dtype,
                "batch_size": config.batch_size,
                "keep_first": config.keep_first,
                "bos": self._bos is not None,
                "shard_rows": config.shard_rows,
                **({"gradients": True} if config.gradients else {}),
                **({"exclude_tokens": self._exclude} if self._exclude else {}),
                **({"max_norm": config.max_norm} if config.max_norm is not None else {}),
            },
        }

    def _describe(self, info: ModelInfo, encoder: bool) -> dict[str, Any]:
        model = {**info.to_json(), "dtype": self._compute, "device": self._device.type}
        paths = {hook: "native" if encoder else info.path_of(hook) for hook in self._config.hook}
        if native := {hook: path for hook, path in paths.items() if path == "native"}:
            model["paths"] = native  # hooks that are not here were read through TransformerLens's bridge
        return model

    def prepare(self) -> None:
        """The forecast, and the first document, so that most errors come before the model is loaded."""
        config = self._config
        expected = forecast(config, self._infos, self._device)  # raises if the disk is too small
        if not config.quiet:
            print(expected, file=sys.stderr)
        documents = read_documents(
            config.text,
            column=config.column,
            split=config.split,
            config=config.text_config,
            on_null=lambda: self._null_rows.append(len(self._labels)),
        )
        first = next(documents)
        ids = list(self._tokens.encode_document(first))
        for info, other in zip(self._infos[1:], self._others, strict=True):
            if list(other.encode_document(first)) != ids:
                raise _other_tokens(self._infos[0], info, "they cut the first document into other tokens")
        self._documents = itertools.chain([first], documents)

    def open(self) -> Mapping[str, Site]:
        config = self._config
        self._models: list[Model | Encoder] = [
            Encoder(info, self._device, self._compute)
            if encoder
            else load_model(info.name, revision=config.revision, device=self._device, dtype=self._compute)
            for info, encoder in zip(self._infos, self._encoders, strict=True)
        ]
        self._sites = {
            site: Site(site, info.axes_of(hook, model.hook_dim(hook)), str(config.dtype), model.path_of(hook))
            for number, (info, model) in enumerate(zip(self._infos, self._models, strict=True))
            for hook in config.hook
            for site in [self._site(number, hook)]
        }
        return self._sites

    def _site(self, number: int, hook: str) -> str:
        """The name of a hook's site: with several models it begins with the number of the model."""
        return hook if len(self._infos) == 1 else f"{number}:{hook}"

    def columns(self) -> Mapping[str, ColumnType]:
        config = self._config
        values = {
            HOOK_PREFIX + hook: ColumnType(site.dtype, (site.d_in,)) for hook, site in self._sites.items()
        }
        if config.gradients:
            values |= {
                GRADIENT_PREFIX + hook: ColumnType(gradient_dtype(site.dtype), (site.d_in,))
                for hook, site in self._sites.items()
            }
        return {
            **values,
            **TEXT_COLUMNS,
            "context_tokens": ColumnType("int32", (config.ctx,)),
        }

    def batches(self) -> Iterator[UnitBatch]:
        first_context = n_null = 0
        for batch in self._context_batches():
            last = max(int(context.docs.max()) for context in batch.contexts)
            self._last_document = max(self._last_document, last)
            left_out = {
                "excluded_tokens": batch.n_excluded,
                "null_rows": sum(place <= self._last_document for place in self._null_rows) - n_null,
            }
            n_null += left_out["null_rows"]
            yield UnitBatch(
                row_columns(batch, first_context),
                context_columns(batch),
                functools.partial(self._run, batch),
                left_out,
            )
            first_context += len(batch.contexts)
        if not first_context:
            raise UserError(
                f"--text {self._config.text} is too short: it has no token after position 0; give more text"
            )

    def files(self) -> Mapping[str, bytes]:
        files = {VOCAB_FILE: vocab_bytes(self._tokens.bytes())}
        labels = self._labels[: self._last_document + 1]
        if any(labels):
            files[LABELS_FILE] = (json.dumps(labels, ensure_ascii=False) + "\n").encode()
        return files

    def nonfinite(self, column: str, batch: UnitBatch, row: int) -> str:
        what, hook = split_column(column)
        way_out = "the model computes such values itself, so choose another hook"
        if self._config.dtype == "fp16" or self._compute != "fp32":
            way_out = "try --dtype fp32"
        place = TEXT.place(int(batch.rows["ctx"][row]), int(batch.rows["pos"][row]))
        return f"{what} at {hook} hold NaN or infinity ({place}); {way_out}"

    def _context_batches(self) -> Iterator[ContextBatch]:
        config = self._config

        def labeled() -> Iterator[Document]:
            for document in self._documents:
                self._labels.append(document.label)
                yield document

        contexts = pack(labeled(), self._tokens.encode_document, ctx=config.ctx, bos=self._bos)
        return batches(
            contexts,
            ctx=config.ctx,
            batch_size=config.batch_size,
            keep_first=config.keep_first,
            keep_last=not config.gradients,
            max_rows=config.tokens,
            exclude=self._exclude,
        )

    def _run(self, batch: ContextBatch) -> dict[str, Tensor]:
        """Columns [N, D] of activations and gradients, on the models' device."""
        hooks = self._config.hook
        tokens_BT = torch.from_numpy(batch.tokens_BT)
        index_N = torch.from_numpy(np.flatnonzero(batch.keep_BT)).to(self._device)
        found: dict[str, Tensor] = {}
        length_B = torch.tensor([len(context) for context in batch.contexts])
        for number, model in enumerate(self._models):
            gradients: dict[str, Tensor] = {}
            if isinstance(model, Encoder):
                activations = model.run_to(tokens_BT, hooks, length_B)
            elif self._config.gradients:
                activations, gradients = model.gradients(tokens_BT, length_B, hooks)
            else:
                activations = model.run_to(tokens_BT, hooks)
            for prefix, values in ((HOOK_PREFIX, activations), (GRADIENT_PREFIX, gradients)):
                for hook, value in values.items():
                    found[prefix + self._site(number, hook)] = value.flatten(0, 1)[index_N]
        return found


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


def require_same_tokens(
    info: ModelInfo, tokens: ModelTokenizer, other_info: ModelInfo, other: ModelTokenizer
) -> None:
    """Raise a UserError unless two tokenizers have the same tokens, so that both models read the same ids."""
    own, theirs = tokens.bytes(), other.bytes()
    n = min(len(own), len(theirs))  # a vocabulary may be padded to a round size
    if own[:n] != theirs[:n] or any(own[n:]) or any(theirs[n:]):
        differing = (i for i, (a, b) in enumerate(zip(own, theirs, strict=False)) if a != b)
        raise _other_tokens(info, other_info, f"the first difference is token {next(differing, n)}")
    if (tokens.separator, tokens.bos) != (other.separator, other.bos):
        raise _other_tokens(info, other_info, "their special tokens are other ones")


def _other_tokens(info: ModelInfo, other: ModelInfo, reason: str) -> UserError:
    return UserError(
        f"{info.name} and {other.name} have different tokenizers ({reason}), so that their rows would not be "
        "of the same tokens; give models with one tokenizer"
    )


def _bos(config: HarvestConfig, info: ModelInfo, tokens: ModelTokenizer) -> int | None:
    """The BOS token id that begins every context, or None."""
    if config.bos == "never" or (config.bos == "auto" and not tokens.adds_bos()):
        return None
    if tokens.bos is None:
        raise UserError(f"--bos always: the tokenizer of {info.name} has no BOS token; use --bos never")
    return tokens.bos
