"""The activation cache: what a model thought while it read, one row a token, mapped from disk.

A cache is a directory: manifest.json, and a folder per column with fixed-size shards (shards.py).

    hook/<hook_name>   [n, d_in]  activations, bf16, fp16 or fp32
    gradient/<hook>    [n, d_in]  if asked for: gradient of the model's loss there, bf16 or fp32 (models.py)
    held_out           [n]        bool: True for rows that SAEs are never trained on
    token doc ctx pos  [n]        int32: token id, document, context, 0-based position within the context
    context_tokens     [n_ctx, ctx_len]  int32: the tokens that the model read
    context_len        [n_ctx]    int32: how many of them are no padding

An import (of an array that came without tokens) has only the first three. One context never mixes held-out
documents with others. Position 0 is usually dropped from the rows, but not from the contexts; so is the last
position of each context from a cache with gradients, since it predicts nothing.
"""

from __future__ import annotations

import difflib
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saebench.activations.manifest import (
    GRADIENT_PREFIX,
    HOOK_PREFIX,
    LABELS_FILE,
    VOCAB_FILE,
    ColumnType,
    read_cache_manifest,
)
from saebench.activations.mapping import map_files
from saebench.activations.shards import TORCH_DTYPES, check_shard, row_bytes, shard_path
from saebench.core.errors import UserError
from saebench.core.files import read_json, sha256_file, sha256_json


class ActivationCache:
    """A finished cache, opened for reading. Made by `open_cache`.

    Tensors are mapped from disk when first asked for: they cost no memory of their own, and writing to one
    changes no file. They stay valid as long as they are referenced.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._manifest = read_cache_manifest(self.path)
        self._tensors: dict[str, Tensor] = {}
        self._check_files()

    def __repr__(self) -> str:
        hooks = ", ".join(f"{hook} [{self.n_rows:,}, {self.d_in(hook)}]" for hook in self.hooks)
        return f"ActivationCache({str(self.path)!r}: {hooks})"

    def __fspath__(self) -> str:
        """A cache can be given wherever the path of one is asked for."""
        return str(self.path)

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as it stands in manifest.json; manifest.py says what is in it."""
        return self._manifest.raw

    @property
    def hash(self) -> str:
        """SHA-256 of the manifest's content, which names every file by checksum."""
        return sha256_json(self._manifest.raw)

    @property
    def model(self) -> dict[str, Any] | None:
        """Name, revision and hash of the model that was harvested; None for an import."""
        model: dict[str, Any] | None = self._manifest.raw["made_from"].get("model")
        return model

    @property
    def hooks(self) -> list[str]:
        return list(self._manifest.hooks)

    @property
    def n_rows(self) -> int:
        return self._manifest.n_rows

    @property
    def n_contexts(self) -> int:
        """0 for an import."""
        return self._manifest.n_contexts

    @property
    def ctx_len(self) -> int | None:
        """Tokens in a context; None for an import."""
        column = self._manifest.columns.get("context_tokens")
        return column.type.row_shape[0] if column else None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the activations."""
        return TORCH_DTYPES[self._type(self.hooks[0]).dtype]

    def d_in(self, hook: str | None = None) -> int:
        """Width of a row of ``hook``, the first hook by default."""
        return self._type(hook).row_shape[0]

    def activations(self, hook: str | None = None) -> Tensor:
        """All rows of ``hook`` (the first hook by default), [n, d_in], mapped from disk.

        Raises:
            UserError: the cache has no such hook; the nearest is offered.
        """
        return self._column(HOOK_PREFIX + self.resolve_hook(hook))

    def has_gradients(self, hook: str | None = None) -> bool:
        """True when the gradients at ``hook`` (the first hook by default) are stored beside its rows."""
        return GRADIENT_PREFIX + self.resolve_hook(hook) in self._manifest.columns

    def gradients(self, hook: str | None = None) -> Tensor:
        """The gradient of the model's loss at each row of ``hook``, [n, d_in], mapped from disk.

        In nats per unit of activation: the derivative of the summed next-token cross entropy of the row's
        whole context (`Model.gradients`).

        Raises:
            UserError: the cache has no such hook, or no gradients there.
        """
        hook = self.resolve_hook(hook)
        if not self.has_gradients(hook):
            way_out = "cache import --gradients" if self.n_contexts == 0 else "harvest --gradients"
            raise UserError(
                f"the cache {self.path} has no gradients at {hook}; make one that has with {way_out}"
            )
        return self._column(GRADIENT_PREFIX + hook)

    def resolve_hook(self, hook: str | None) -> str:
        """``hook`` if the cache has it, the first hook for None."""
        if hook is None:
            return self.hooks[0]
        if hook not in self.hooks:
            near = difflib.get_close_matches(hook, self.hooks, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(self.hooks)}"
            raise UserError(f"the cache {self.path} has no hook {hook!r}; {hint}")
        return hook

    @property
    def held_out(self) -> Tensor:
        """[n] bool: rows of held-out documents (of an import: the last 5%)."""
        return self._column("held_out")

    @property
    def tokens(self) -> Tensor | None:
        """[n] int32: token id of each row."""
        return self._optional("token")

    @property
    def doc(self) -> Tensor | None:
        """[n] int32: document of each row, numbered as they were read."""
        return self._optional("doc")

    @property
    def ctx(self) -> Tensor | None:
        """[n] int32: context of each row."""
        return self._optional("ctx")

    @property
    def pos(self) -> Tensor | None:
        """[n] int32: 0-based position of each row within its context."""
        return self._optional("pos")

    @property
    def context_tokens(self) -> Tensor | None:
        """[n_ctx, ctx_len] int32: the tokens that the model read; 0 beyond ``context_len``."""
        return self._optional("context_tokens")

    @property
    def context_len(self) -> Tensor | None:
        """[n_ctx] int32: tokens in each context."""
        return self._optional("context_len")

    def vocab(self) -> list[bytes] | None:
        """The bytes that each token id stands for; None for an import.

        Raises:
            UserError: the file is not as it was written.
        """
        if VOCAB_FILE not in self._manifest.files:
            return None
        return read_vocab(self._intact(VOCAB_FILE))

    def doc_labels(self) -> list[str] | None:
        """A name for each document ("1862 Abraham Lincoln (Republican)"), '' where none; None without any.

        Raises:
            UserError: the file is not as it was written.
        """
        if LABELS_FILE not in self._manifest.files:
            return None
        return [str(label) for label in read_json(self._intact(LABELS_FILE), what="the document labels")]

    def verify(self) -> None:
        """Compute every checksum anew; reads the whole cache.

        Raises:
            UserError: naming the first file whose bytes are not those that were written.
        """
        self._check_files()
        for name, column in self._manifest.columns.items():
            for i, shard in enumerate(column.shards):
                _check_sha256(shard_path(self.path / name, i), shard.sha256)
        for name in self._manifest.files:
            self._intact(name)

    def _check_files(self) -> None:
        """The cheap checks: every file is there, of its size, and every shard has the right header."""
        for name, column in self._manifest.columns.items():
            for i, shard in enumerate(column.shards):
                shape = (shard.rows, *column.type.row_shape)
                check_shard(shard_path(self.path / name, i), column.type.dtype, shape)
        for name, (n_bytes, _) in self._manifest.files.items():
            path = self.path / name
            if not path.exists():
                raise UserError(f"{path} is missing from the cache; restore it or make the cache again")
            if (seen := path.stat().st_size) != n_bytes:
                raise UserError(
                    f"{path} has {seen:,} bytes but its manifest says {n_bytes:,}; "
                    "restore it or make the cache again"
                )

    def _intact(self, name: str) -> Path:
        """Where a file beside the columns is, its checksum computed first: these files are small."""
        path = self.path / name
        _check_sha256(path, self._manifest.files[name][1])
        return path

    def _type(self, hook: str | None) -> ColumnType:
        return self._manifest.columns[HOOK_PREFIX + self.resolve_hook(hook)].type

    def _optional(self, name: str) -> Tensor | None:
        return self._column(name) if name in self._manifest.columns else None

    def _column(self, name: str) -> Tensor:
        if name not in self._tensors:
            column = self._manifest.columns[name]
            files = [shard_path(self.path / name, i) for i in range(len(column.shards))]
            sizes = [
                shard.rows * row_bytes(column.type.dtype, column.type.row_shape) for shard in column.shards
            ]
            flat = map_files(files, sizes, dtype=TORCH_DTYPES[column.type.dtype])
            self._tensors[name] = flat.view(-1, *column.type.row_shape)
        return self._tensors[name]


def open_cache(path: str | Path) -> ActivationCache:
    """Open the activation cache in directory ``path``.

    Reads the manifest and checks that every file is there with its exact size and header;
    `ActivationCache.verify` computes the checksums too.

    >>> cache = sb.open_cache(cache)
    >>> len(cache.tokens) == len(cache.activations())
    True

    Raises:
        UserError: there is no cache, it is unfinished, damaged, cut short, or of a newer format.
    """
    return ActivationCache(path)


def vocab_bytes(vocab: list[bytes]) -> bytes:
    """The file of a vocabulary: safetensors with ``bytes``, tokens end to end, and ``offsets`` [V + 1]."""
    from safetensors.torch import save

    lengths = torch.tensor([0, *map(len, vocab)], dtype=torch.int64)
    text = bytearray(b"".join(vocab))
    data = torch.frombuffer(text, dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
    return bytes(save({"bytes": data, "offsets": lengths.cumsum(0)}))


def read_vocab(path: Path) -> list[bytes]:
    """The inverse of `vocab_bytes`."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    text, offsets = tensors["bytes"].numpy().tobytes(), tensors["offsets"].tolist()
    return [text[start:end] for start, end in itertools.pairwise(offsets)]


def _check_sha256(path: Path, expected: str) -> None:
    seen = sha256_file(path)
    if seen != expected:
        raise UserError(
            f"{path} is damaged: its SHA-256 is {seen[:12]}... but the manifest says {expected[:12]}...; "
            "restore it or make the cache again"
        )
