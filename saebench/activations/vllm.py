"""Import of hidden states that vLLM has written: one file per request, of several layers.

A file is FILE.safetensors, or FILE.safetensors.zst, with two tensors:

    token_ids       [T]        the tokens that the model read
    hidden_states   [T, L, D]  for each of L layers, in the order in which they were asked for

Layer i is the residual stream that enters block i, ``blocks.i.hook_resid_pre``; the number of layers stands
for the output of the last block. The files say neither the layers nor the model.

Shapes: T tokens of a file, L layers, D width of the residual stream, N rows.
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saebench.activations.cache import ActivationCache, vocab_bytes
from saebench.activations.manifest import HOOK_PREFIX, LABELS_FILE, VOCAB_FILE
from saebench.activations.packing import Context, ContextBatch, batches
from saebench.activations.settings import ImportConfig
from saebench.activations.shards import row_bytes
from saebench.activations.text_source import TEXT_COLUMNS, context_columns, row_columns
from saebench.activations.writing import Target, warn_of_held_out, write_cache
from saebench.core.device import pick_device
from saebench.core.errors import UserError
from saebench.core.files import free_memory, require_disk, sha256_file
from saebench.core.reading import check_shape, parse_json, shown
from saebench.core.shapes import TensorEntry
from saebench.sources.base import ColumnType, Site, UnitBatch
from saebench.sources.modality import TEXT
from saebench.sources.models import Model, load_model, peek_model
from saebench.sources.text import Document
from saebench.sources.text_files import open_bytes
from saebench.sources.tokenizer import open_tokenizer

FILES_AT_ONCE = 16
CHECKED_TOKENS = 64
"""Most tokens of the file that is compared with a forward pass."""
TOLERANCE = 0.1
"""Largest median over positions of |found - computed| / |computed|. Half precision gives 0.001 to 0.03."""
_SUFFIXES = (".safetensors", ".safetensors.zst")
_DTYPES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_INTEGERS = {"I64", "I32", "U32", "U16", "I16"}


@dataclass(frozen=True)
class _File:
    """One request. ``read`` gives token_ids [T] and hidden_states [T, L, D]."""

    path: Path
    label: str
    n_tokens: int
    dtype: str

    def read(self, *names: str) -> list[Tensor]:
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load

        try:
            if self.path.suffix == ".zst":
                with open_bytes(self.path) as file:
                    tensors = load(file.read())
                return [tensors[name] for name in names]
            with safe_open(self.path, framework="pt") as opened:
                return [opened.get_tensor(name) for name in names]
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{self.path} is damaged ({shown(str(error), 200)}); write or copy it again"
            ) from None


def import_vllm(config: ImportConfig) -> ActivationCache:
    """Make a text cache of the files in directory ``config.source``; see `import_activations`."""
    source = VllmSource(config)
    target = Target(
        out=config.out, shard_rows=config.shard_rows, quiet=config.quiet, total=source.n_rows, unit="tok"
    )
    cache, made = write_cache(source, target, facts=lambda: {"verified": source.verified})
    if made:
        warn_of_held_out(cache, "import more requests")
    return cache


class VllmSource:
    """The hidden states in a directory of vLLM's files, each of which is a document and a context.

    Raises:
        UserError: the directory holds other files or none, a file does not fit the model or the layers.
    """

    modality = TEXT.name
    kind: Any = "import"

    def __init__(self, config: ImportConfig) -> None:
        assert config.model is not None
        self._config = config
        self._info = peek_model(config.model, revision=config.revision, need_weights=False)
        self._tokens = open_tokenizer(self._info)
        self._hooks = [self._hook(layer) for layer in config.layers]
        self._files = [self._described(path) for path in find_files(config.source)]
        longest = max(file.n_tokens for file in self._files)
        self._ctx = min(config.ctx or longest, longest)
        self._dtype = config.dtype or self._files[0].dtype
        first = int(not config.keep_first)
        self.n_rows = sum(max(0, min(file.n_tokens, self._ctx) - first) for file in self._files)
        self.verified = False

    def _hook(self, layer: int) -> str:
        n_layers = self._info.n_layers
        if not 0 <= layer <= n_layers:
            raise UserError(f"--layers has {layer}, but {self._info.name} has the layers 0 to {n_layers}")
        return _hook_of(layer, n_layers)

    def _described(self, path: Path) -> _File:
        """The file at ``path``, from its header."""
        described = read_header(path)
        tokens, states = (described.get(name) for name in ("token_ids", "hidden_states"))
        if tokens is None or states is None:
            found = ", ".join(described) or "none"
            raise UserError(
                f"{path} does not hold the tensors token_ids and hidden_states (its tensors: {found}); move "
                "files of another kind out of the directory"
            )
        shape, n_layers = states["shape"], len(self._config.layers)
        if len(shape) != 3 or tokens["shape"] != shape[:1] or 0 in shape:
            raise UserError(
                f"{path} has token_ids {tokens['shape']} and hidden_states {shape}; [tokens] and "
                "[tokens, layers, hidden] were expected"
            )
        if shape[1] != n_layers:
            raise UserError(
                f"{path} holds {shape[1]} layers, but --layers names {n_layers}; name those that were "
                "asked for, in their order"
            )
        if shape[2] != self._info.d_model:
            raise UserError(
                f"{path} has hidden states of width {shape[2]}, but those of {self._info.name} have "
                f"{self._info.d_model}; check --model"
            )
        if states["dtype"] not in _DTYPES or tokens["dtype"] not in _INTEGERS:
            raise UserError(
                f"{path} has token_ids of type {tokens['dtype']} and hidden_states of {states['dtype']}; "
                "integers and one of BF16, F16, F32 were expected"
            )
        label = path.relative_to(self._config.source).as_posix()
        return _File(path, label, shape[0], _DTYPES[states["dtype"]])

    def identity(self) -> dict[str, Any]:
        config, sums = self._config, hashlib.sha256()
        for file in self._files:
            sums.update(f"{file.label} {sha256_file(file.path)}\n".encode())
        first = self._token_ids(self._files[0])[0]
        return {
            "source": {
                "name": config.source.name,
                "format": "vllm",
                "files": len(self._files),
                "sha256": sums.hexdigest(),
            },
            "model": self._info.to_json(),
            "settings": {
                "hook": self._hooks,
                "layers": list(config.layers),
                "ctx": self._ctx,
                "dtype": self._dtype,
                "keep_first": config.keep_first,
                "bos": self._tokens.bos is not None and int(first) == self._tokens.bos,
                "shard_rows": config.shard_rows,
            },
        }

    def prepare(self) -> None:
        row = len(self._hooks) * row_bytes(self._dtype, (self._info.d_model,)) + 17
        n_bytes = self.n_rows * row + len(self._files) * 4 * (self._ctx + 1)
        require_disk(self._config.out, n_bytes, what="the activation cache")
        if self.n_rows == 0:
            raise UserError(
                f"no file in {self._config.source} has a token after position 0; add --keep-first"
            )

    def open(self) -> Mapping[str, Site]:
        self.verified = self._verify()
        axes = (("d", self._info.d_model),)
        return {hook: Site(hook, axes, self._dtype, "engine") for hook in self._hooks}

    def _verify(self) -> bool:
        """Compare one short file with a forward pass, if the model can be loaded here; False if it cannot."""
        if self._config.verify and (model := self._loaded()) is not None:
            file = min(self._files[:1000], key=lambda file: (file.n_tokens < 2, file.n_tokens))
            if file.n_tokens > 1:
                [states_TLD] = file.read("hidden_states")
                check_layers(model, self._config.layers, self._token_ids(file), states_TLD, file.path)
                return True
        print(
            "warning: the order of the layers was not compared with a forward pass of the model, and the "
            'manifest says "verified": false',
            file=sys.stderr,
        )
        return False

    def _loaded(self) -> Model | None:
        """The model, if its weights are here and fit into memory."""
        n_bytes = sum(path.stat().st_size for path in self._info.folder.glob("*.safetensors"))
        free = free_memory()
        if not n_bytes or (free is not None and 2 * n_bytes > free):  # in float32 it is up to twice as large
            return None
        config = self._config
        assert config.model is not None
        try:
            return load_model(config.model, revision=config.revision, device=pick_device(config.device))
        except UserError as error:
            print(f"note: {error}", file=sys.stderr)
            return None

    def columns(self) -> Mapping[str, ColumnType]:
        values = {HOOK_PREFIX + hook: ColumnType(self._dtype, (self._info.d_model,)) for hook in self._hooks}
        return {**values, **TEXT_COLUMNS, "context_tokens": ColumnType("int32", (self._ctx,))}

    def batches(self) -> Iterator[UnitBatch]:
        first_context = 0
        made = batches(
            self._contexts(),
            ctx=self._ctx,
            batch_size=FILES_AT_ONCE,
            keep_first=self._config.keep_first,
            max_rows=self.n_rows,
        )
        for batch in made:
            left_out = sum(self._files[int(c.docs[0])].n_tokens - len(c) for c in batch.contexts)
            yield UnitBatch(
                row_columns(batch, first_context),
                context_columns(batch),
                functools.partial(self._states, batch),
                {"beyond_ctx": left_out},
            )
            first_context += len(batch.contexts)

    def _contexts(self) -> Iterator[Context]:
        for number, file in enumerate(self._files):
            tokens_T = self._token_ids(file)
            held_out = Document("", tokens=tuple(tokens_T.tolist())).held_out
            docs_T = np.full(len(tokens_T), number, np.int32)
            yield Context(tokens_T.numpy().astype(np.int32), docs_T, held_out).cut(self._ctx)

    def _token_ids(self, file: _File) -> Tensor:
        """int64 [T]."""
        [tokens_T] = file.read("token_ids")
        tokens_T = tokens_T.to(torch.int64)
        if (tokens_T < 0).any() or (tokens_T >= self._info.vocab_size).any():
            raise UserError(
                f"{file.path} has token ids outside the vocabulary of {self._info.name}, 0 to "
                f"{self._info.vocab_size - 1}; check --model"
            )
        return tokens_T

    def _states(self, batch: ContextBatch) -> dict[str, Tensor]:
        parts = []
        for context, keep_T in zip(batch.contexts, batch.keep_BT, strict=True):
            [states_TLD] = self._files[int(context.docs[0])].read("hidden_states")
            parts.append(states_TLD[: self._ctx][torch.from_numpy(keep_T[: len(context)])])
        states_NLD = torch.cat(parts)
        return {HOOK_PREFIX + hook: states_NLD[:, i] for i, hook in enumerate(self._hooks)}

    def files(self) -> Mapping[str, bytes]:
        labels = json.dumps([file.label for file in self._files], ensure_ascii=False) + "\n"
        return {VOCAB_FILE: vocab_bytes(self._tokens.bytes()), LABELS_FILE: labels.encode()}

    def nonfinite(self, column: str, batch: UnitBatch, row: int) -> str:
        file = self._files[int(batch.rows["doc"][row])]
        hook = column.removeprefix(HOOK_PREFIX)
        return (
            f"{file.path} holds NaN or infinity at position {int(batch.rows['pos'][row])} of {hook}; remove "
            "the file, or pass --dtype fp32 if the values are too large for fp16"
        )


def find_files(folder: Path) -> list[Path]:
    """The files of a directory and its folders, ordered by path; names that begin with a dot are left out.

    Raises:
        UserError: it is not a directory, is empty, or holds files of another kind.
    """
    if not folder.is_dir():
        what = "is not a directory" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}; give the directory that vLLM wrote its files into")
    found = []
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        if not path.is_file() or any(part.startswith(".") for part in parts):
            continue
        if not path.name.endswith(_SUFFIXES):
            raise UserError(
                f"{path} is neither a .safetensors nor a .safetensors.zst file; move it out of the directory"
            )
        found.append(path)
    if not found:
        raise UserError(f"{folder} holds no .safetensors file; give the directory that vLLM wrote into")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def read_header(path: Path) -> dict[str, Any]:
    """Name -> dtype, shape and offsets of the tensors in a safetensors file, which may be compressed.

    Raises:
        UserError: it is not such a file, or it is truncated.
    """
    try:
        with open_bytes(path) as file:
            (n_bytes,) = struct.unpack("<Q", file.read(8))
            text = file.read(n_bytes) if n_bytes < 2**27 else b""
        tensors: dict[str, Any] = parse_json(text)
        tensors.pop("__metadata__", None)
        for name, tensor in tensors.items():
            check_shape(tensor, TensorEntry, source=f"its tensor {name!r:.60}")
        end = max(tensor["data_offsets"][1] for tensor in tensors.values())
        if path.suffix != ".zst" and path.stat().st_size != 8 + n_bytes + end:
            raise ValueError(f"it has {path.stat().st_size:,} bytes instead of {8 + n_bytes + end:,}")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, struct.error) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is not a whole safetensors file ({reason}); write or copy it again"
        ) from None
    return tensors


def check_layers(
    model: Model, layers: Sequence[int], tokens_T: Tensor, states_TLD: Tensor, path: Path
) -> None:
    """Compare the hidden states of one file with a forward pass of the model.

    Each of them must differ by at most `TOLERANCE` from the layer that it is said to be, and by less than
    from any other layer.

    Raises:
        UserError: they do not; the sentence says which layers they are, if they are layers of this model.
    """
    tokens_T, found_TLD = tokens_T[:CHECKED_TOKENS], states_TLD[:CHECKED_TOKENS].float()
    n = model.n_layers
    hooks = [_hook_of(layer, n) for layer in range(n + 1)]
    computed = model.run_to(tokens_T[None], hooks)
    computed_TKD = torch.stack([computed[hook][0].float().cpu() for hook in hooks], dim=1)
    computed_TKD, found_TLD = computed_TKD[1:], found_TLD[1:]  # position 0 is alike in many layers
    if not found_TLD.isfinite().all():
        raise UserError(f"{path} holds NaN or infinity; remove the file")
    difference_TLK = (found_TLD[:, :, None] - computed_TKD[:, None]).norm(dim=-1)
    error_LK = (difference_TLK / computed_TKD.norm(dim=-1)[:, None]).median(dim=0).values
    fits = [int(best) if low <= TOLERANCE else None for low, best in zip(*error_LK.min(dim=1), strict=True)]
    if fits == list(layers):
        return
    said = ",".join(map(str, layers))
    if None not in fits:
        right = ",".join(map(str, fits))
        raise UserError(
            f"the hidden states in {path} are those of the layers {right} of {model.name}, but --layers is "
            f"{said}; pass --layers {right}"
        )
    worst = float(error_LK[range(len(layers)), list(layers)].max())
    raise UserError(
        f"the hidden states in {path} differ from those of {model.name} at the layers {said} by {worst:.0%}, "
        "and no layer fits better; check --model, or pass --no-verify to import them unverified"
    )


def _hook_of(layer: int, n_layers: int) -> str:
    if layer == n_layers:
        return f"blocks.{n_layers - 1}.hook_resid_post"
    return f"blocks.{layer}.hook_resid_pre"
