"""ActivationCache: a model's activations, one row per token or other unit, memory-mapped from disk.

A cache is a directory with manifest.json and one folder of fixed-size shards per column (shards.py).

    hook/<site>        [n, d_in]  activations, bf16, fp16 or fp32; several axes are flattened
    gradient/<site>    [n, d_in]  with --gradients: gradient of the model's loss, bf16 or fp32
    held_out           [n]        bool: True for rows that SAEs are never trained on

A cache of a text also has

    token doc ctx pos  [n]        int32: token id, document, context, 0-based position within the context
    context_tokens     [n_ctx, ctx_len]  int32: the tokens that the model read
    context_len        [n_ctx]    int32: the number of them that are not padding

and one of other units (sb.ModuleSource, arrays with positions)

    unit pos           [n]        int32: number of the unit, 0-based position within it
    unit_len           [n_units]  int32: positions of each unit
    row_column/<name> unit_column/<name>  columns of the user's, per row or per unit

An array of vectors has neither. A context never mixes held-out documents with others. By default position 0
has no row, though the contexts contain it. In a cache with gradients the last position of each context has no
row either, because it predicts nothing.
"""

from __future__ import annotations

import difflib
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saebench.activations.diagnosis import diagnose, largest_norm
from saebench.activations.manifest import (
    GRADIENT_PREFIX,
    HOOK_PREFIX,
    LABELS_FILE,
    ROW_PREFIX,
    UNIT_PREFIX,
    VOCAB_FILE,
    column_folder,
    read_cache_manifest,
)
from saebench.activations.shards import TORCH_DTYPES, check_shard, shard_path
from saebench.activations.verifying import VerifiedColumn, check_sha256
from saebench.core.errors import UserError
from saebench.core.reading import read_json, require_file
from saebench.core.refusals import system_refusals
from saebench.sources.base import ColumnType, Site
from saebench.sources.modality import Modality


class ActivationCache:
    """A finished cache, opened for reading. Made by `open_cache`.

    Tensors are memory-mapped on first use: they need no memory of their own, and writing to one does not
    change a file. They stay valid as long as they are referenced. Rows are compared with their checksums,
    once per process, before they are given: `activations`, `gradients` and the other columns verify all rows
    of a column, `verified` only those that are read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._manifest = read_cache_manifest(self.path)
        self._columns: dict[str, VerifiedColumn] = {}
        self._diagnosis: dict[str, Any] | None = None
        self._check_files()

    def __repr__(self) -> str:
        hooks = ", ".join(f"{hook} [{self.n_rows:,}, {self.d_in(hook)}]" for hook in self.hooks)
        return f"ActivationCache({str(self.path)!r}: {hooks})"

    def __fspath__(self) -> str:
        """The path of the cache: functions that take a path also take the cache itself."""
        return str(self.path)

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of manifest.json; its fields are documented in manifest.py."""
        return self._manifest.raw

    @property
    def hash(self) -> str:
        """SHA-256 of the manifest's content without the diagnosis; it holds the checksum of every file."""
        return self._manifest.hash

    @property
    def model(self) -> dict[str, Any] | None:
        """Name, revision and hash of the language model that was harvested.

        None if the cache was made of an array, of a module, or with several models (`model_of`).
        """
        model: dict[str, Any] | None = self._manifest.raw["made_from"].get("model")
        return model

    @property
    def models(self) -> list[dict[str, Any]]:
        """Name, revision and hash of every language model that was harvested, in order."""
        models: list[dict[str, Any]] = self._manifest.raw["made_from"].get("models", [])
        return [self.model] if self.model is not None else models

    def model_of(self, hook: str | None = None) -> dict[str, Any] | None:
        """Name, revision and hash of the model that ``hook`` (the first by default) is in, or None."""
        if self.model is not None or not self.models:
            return self.model
        return self.models[int(self.resolve_hook(hook).partition(":")[0])]

    def hook_of(self, hook: str | None = None) -> str:
        """The name that ``hook`` (the first by default) has in its model: 'S' for the site '1:S'."""
        site = self.resolve_hook(hook)
        return site if self.model is not None or not self.models else site.partition(":")[2]

    @property
    def modality(self) -> Modality:
        """What rows and units are."""
        return self._manifest.modality

    @property
    def hooks(self) -> list[str]:
        """The names of the sites."""
        return list(self._manifest.sites)

    @property
    def sites(self) -> dict[str, Site]:
        """The sites by name: native shape, stored type, and what gave the activations."""
        return dict(self._manifest.sites)

    @property
    def n_rows(self) -> int:
        return self._manifest.n_rows

    @property
    def n_contexts(self) -> int:
        """Number of contexts, or of other units; 0 for an array of vectors."""
        return self._manifest.n_contexts

    @property
    def ctx_len(self) -> int | None:
        """Tokens per context; None for an imported cache."""
        column = self._manifest.columns.get("context_tokens")
        return column.type.row_shape[0] if column else None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the activations."""
        return TORCH_DTYPES[self._type(self.hooks[0]).dtype]

    def d_in(self, hook: str | None = None) -> int:
        """Width of a row of ``hook``, the first hook by default."""
        return self._type(hook).row_shape[0]

    def verified(self, hook: str | None = None) -> VerifiedColumn:
        """The rows of ``hook`` for reading some of them: ``cache.verified(hook)[rows]`` verifies only these.

        Raises:
            UserError: the cache has no such hook. Reading raises one for rows that are damaged on disk.
        """
        return self._verified_column(HOOK_PREFIX + self.resolve_hook(hook))

    def activations(self, hook: str | None = None, *, native: bool = False, verify: bool = True) -> Tensor:
        """All rows of ``hook`` (the first hook by default), [n, d_in], mapped from disk.

        With ``native`` a row has the axes of the site, such as [n, head, d_head]. The first call in a process
        reads the whole column to verify it; ``verify=False`` leaves that out, and `verified` verifies the
        rows that are used.

        Raises:
            UserError: the cache has no such hook (the sentence gives the nearest name), or a damaged shard.
        """
        hook = self.resolve_hook(hook)
        column = self.verified(hook)
        rows_ND = column.all() if verify else column.tensor
        return rows_ND.view(-1, *self._manifest.sites[hook].shape) if native else rows_ND

    def has_gradients(self, hook: str | None = None) -> bool:
        """True when the cache has gradients at ``hook`` (the first hook by default)."""
        return GRADIENT_PREFIX + self.resolve_hook(hook) in self._manifest.columns

    def gradients(self, hook: str | None = None) -> Tensor:
        """All gradients, verified; see `verified_gradients`."""
        return self.verified_gradients(hook).all()

    def verified_gradients(self, hook: str | None = None) -> VerifiedColumn:
        """The gradient of the model's loss at each row of ``hook``, [n, d_in], mapped from disk.

        In nats per unit of activation: the derivative of the summed next-token cross entropy of the whole
        context of the row (`Model.gradients`).

        Raises:
            UserError: the cache has no such hook, or no gradients there.
        """
        hook = self.resolve_hook(hook)
        if not self.has_gradients(hook):
            imported = self._manifest.kind == "import"
            way_out = "cache import --gradients" if imported else "harvest --gradients"
            raise UserError(
                f"the cache {self.path} has no gradients at {hook}; make a cache with gradients by {way_out}"
            )
        return self._verified_column(GRADIENT_PREFIX + hook)

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
        """[n] bool: rows of held-out documents (in an imported cache, the last 5%)."""
        return self._column("held_out")

    @property
    def tokens(self) -> Tensor | None:
        """[n] int32: token id of each row."""
        return self._optional("token")

    @property
    def doc(self) -> Tensor | None:
        """[n] int32: document of each row, numbered from 0 in the order of reading."""
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
    def unit(self) -> Tensor | None:
        """[n] int32: number of the unit of each row; of a text, its context. None for an array of vectors."""
        return self._optional(self.modality.unit_column)

    @property
    def unit_len(self) -> Tensor | None:
        """[n_contexts] int32: positions of each unit; of a text, the tokens of each context."""
        return self._optional(self.modality.length_column)

    def row_columns(self) -> dict[str, Tensor]:
        """The user's columns with one value per row, [n] each, by name."""
        return self._with_prefix(ROW_PREFIX)

    def unit_columns(self) -> dict[str, Tensor]:
        """The user's columns with one value per unit, [n_contexts] each, by name."""
        return self._with_prefix(UNIT_PREFIX)

    def _with_prefix(self, prefix: str) -> dict[str, Tensor]:
        names = [name for name in self._manifest.columns if name.startswith(prefix)]
        return {name.removeprefix(prefix): self._column(name) for name in names}

    @property
    def context_tokens(self) -> Tensor | None:
        """[n_ctx, ctx_len] int32: the tokens that the model read; 0 beyond ``context_len``."""
        return self._optional("context_tokens")

    @property
    def context_len(self) -> Tensor | None:
        """[n_ctx] int32: tokens in each context."""
        return self._optional("context_len")

    def vocab(self) -> list[bytes] | None:
        """The bytes that each token id stands for; None for an imported cache.

        Raises:
            UserError: the file does not match its checksum.
        """
        if VOCAB_FILE not in self._manifest.files:
            return None
        return read_vocab(self._verified(VOCAB_FILE))

    def doc_labels(self) -> list[str] | None:
        """A label for each document ("1862 Abraham Lincoln (Republican)"), or ''; None when all are ''.

        Raises:
            UserError: the file does not match its checksum.
        """
        if LABELS_FILE not in self._manifest.files:
            return None
        return [str(label) for label in read_json(self._verified(LABELS_FILE), what="the document labels")]

    @property
    def diagnosis(self) -> dict[str, Any]:
        """Norms of the rows, where their variance is, the error of the stored type, and the documents.

        The manifest has it; for a cache of an older version it is computed. See diagnosis.py.
        """
        kept: dict[str, Any] = self._manifest.raw.get("diagnosis") or {"sites": {}}
        if all("massive_rows" in found for found in kept["sites"].values()) and kept["sites"]:
            return kept
        if self._diagnosis is None:  # an earlier version has written none, or another one
            sites = {name: self.activations(name) for name in self.hooks}
            known = {name: found["norm"]["max"] for name, found in kept["sites"].items()}
            norms = {name: known.get(name) or largest_norm(x_ND) for name, x_ND in sites.items()}
            self._diagnosis = diagnose(sites, norms, self.held_out, self.doc)
        return self._diagnosis

    def verify(self) -> None:
        """Check every checksum; reads the whole cache.

        Raises:
            UserError: a file does not match its checksum; the sentence names the first one.
        """
        self._check_files()
        for name, column in self._manifest.columns.items():
            for i, shard in enumerate(column.shards):
                check_sha256(shard_path(self.path / column_folder(name), i), shard.sha256)
        for name in self._manifest.files:
            self._verified(name)

    def _check_files(self) -> None:
        """The fast checks: every file exists with the right size, and every shard has the right header."""
        for name, column in self._manifest.columns.items():
            for i, shard in enumerate(column.shards):
                shape = (shard.rows, *column.type.row_shape)
                check_shard(shard_path(self.path / column_folder(name), i), column.type.dtype, shape)
        for name, (n_bytes, _) in self._manifest.files.items():
            path = self.path / name
            seen = require_file(
                path, what="the file of the cache", way_out="restore it or make the cache again"
            )
            if seen != n_bytes:
                raise UserError(
                    f"{path} has {seen:,} bytes but its manifest says {n_bytes:,}; "
                    "restore it or make the cache again"
                )

    def _verified(self, name: str) -> Path:
        """The path of a file that is not a column, after a check of its checksum; these files are small."""
        path = self.path / name
        check_sha256(path, self._manifest.files[name][1])
        return path

    def _type(self, hook: str | None) -> ColumnType:
        return self._manifest.columns[HOOK_PREFIX + self.resolve_hook(hook)].type

    def _optional(self, name: str) -> Tensor | None:
        return self._column(name) if name in self._manifest.columns else None

    def _column(self, name: str) -> Tensor:
        return self._verified_column(name).all()

    def _verified_column(self, name: str) -> VerifiedColumn:
        if name not in self._columns:
            self._columns[name] = VerifiedColumn(self.path, name, self._manifest.columns[name])
        return self._columns[name]


@system_refusals()
def open_cache(path: str | Path) -> ActivationCache:
    """Open the activation cache in directory ``path``.

    Reads the manifest and checks that every file exists with the right size and header. Checksums are
    compared when rows are first read; `ActivationCache.verify` compares all of them.

    >>> cache = sb.open_cache(cache)
    >>> len(cache.tokens) == len(cache.activations())
    True

    Raises:
        UserError: the cache does not exist, is unfinished, damaged or truncated, or has a newer format.
    """
    return ActivationCache(path)


def vocab_bytes(vocab: list[bytes]) -> bytes:
    """The bytes of a vocabulary file: safetensors with concatenated ``bytes`` and ``offsets`` [V + 1]."""
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
