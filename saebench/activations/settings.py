"""Settings of harvesting and importing activations."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from saebench.activations.import_registry import IMPORT_FORMATS
from saebench.core.bounds import AtLeast
from saebench.core.errors import UserError
from saebench.core.settings import Settings, shown_name

StoredDtype = Literal["bf16", "fp16", "fp32"]

DEMO_HOOK = "blocks.2.hook_resid_post"
MAX_SHARDS = 8192
"""Most shards of a column: a reader maps each one, and Linux allows a process 65,530 mappings."""


@dataclass(frozen=True, kw_only=True)
class HarvestConfig(Settings):
    """Run a model on a text and store its activations at one or more hooks."""

    out: Path
    """Directory of the activation cache."""
    model: tuple[str, ...] = ("demo",)
    """'demo', 'smollm2', a local Hugging Face folder, or a hub name; repeat for several models that read the
    same tokens, whose sites are then named 0:SITE, 1:SITE."""
    text: str = "sotu"
    """'sotu'; a local file (.txt, .jsonl, .json, .parquet, .csv or .tsv, also with .gz or .zst); a folder
    (one document per file, a data set, or one written by save_to_disk); or the hub name of a data set."""
    hook: tuple[str, ...] = (DEMO_HOOK,)
    """Hook where activations are read, by its TransformerLens name, or module path; repeat for several in one
    pass."""
    tokens: Annotated[int, AtLeast(1)] = 2_000_000
    """Rows to store per hook (one row per token); fewer if the text ends first."""
    ctx: Annotated[int, AtLeast(2)] = 128
    """Tokens in a context."""
    gradients: bool = False
    """Also store the gradient of the model's loss at every row; a gradient SAE needs it."""
    dtype: StoredDtype = "bf16"
    """Type in which activations and gradients are stored; with fp16, gradients are stored as bf16."""
    batch_size: Annotated[int, AtLeast(1)] = 32
    """Contexts in one forward pass."""
    keep_first: bool = False
    """Keep position 0 of every context (an attention sink of huge norm in most models)."""
    exclude_tokens: tuple[str | int, ...] = ()
    """Tokens whose positions get no row: token ids, texts of one token, or 'special' for all special tokens;
    repeat for several."""
    max_norm: Annotated[float | None, AtLeast(1)] = None
    """Leave out rows whose norm at any hook is above this multiple of the median norm of the first batch."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Whether every context begins with the BOS token; 'auto' does what the model's tokenizer does."""
    revision: str | None = None
    """Revision of a model from the hub."""
    column: str = "text"
    """Column of the text that holds the documents: texts, lists of token ids, or chats (lists of messages
    with role and content)."""
    split: str = "train"
    """Split of a data set."""
    text_config: str | None = None
    """Configuration of a data set that has several."""
    shard_rows: int = 65_536
    """Rows in a shard file; a multiple of 32,768."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda' or 'cuda:1'."""
    quiet: bool = False
    """No progress display."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradients and not self.keep_first and self.ctx == 2:
            raise UserError(
                "--ctx 2 leaves no row with a gradient: position 0 is dropped and the last one predicts "
                "nothing; raise --ctx or pass --keep-first"
            )
        if not self.model:
            raise UserError("no model was named; pass --model, for example --model demo")
        if not self.hook:
            raise UserError("no hook was named; pass --site, for example --site blocks.2.hook_resid_post")
        if len(set(self.hook)) != len(self.hook):
            raise UserError(f"--site names the same hook twice: {', '.join(self.hook)}")
        _check_shard_rows(self.shard_rows)
        if self.tokens > MAX_SHARDS * self.shard_rows:
            enough = 32_768 * math.ceil(self.tokens / MAX_SHARDS / 32_768)
            raise UserError(
                f"{self.tokens:,} tokens in shards of {self.shard_rows:,} rows are more files than one "
                f"process can map; pass --shard-rows {enough}"
            )


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Settings):
    """Store the activations of a source other than a text."""

    out: Path
    """Directory of the activation cache."""
    tokens: Annotated[int, AtLeast(1)] | None = None
    """Most rows to store per site; by default all."""
    dtype: StoredDtype = "bf16"
    """Type in which activations are stored."""
    shard_rows: int = 65_536
    """Rows in a shard file; a multiple of 32,768."""
    quiet: bool = False
    """No progress display."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_shard_rows(self.shard_rows)


_OF_FORMAT = {
    "array": ("also", "gradients", "hook"),
    "vllm": ("model", "revision", "layers", "ctx", "keep_first", "verify", "device"),
}
"""Format -> the settings that only it has."""


@dataclass(frozen=True, kw_only=True)
class ImportConfig(Settings):
    """Make an activation cache from arrays in files, or from hidden states that vLLM has written."""

    source: Path
    """A .npy file or a .safetensors file with one tensor, of shape [n, d_in], or [n, t, d_in] for n units of
    t positions; with --format vllm, the directory of its files."""
    out: Path
    """Directory of the activation cache."""
    also: tuple[Path, ...] = ()
    """Further arrays with the same rows, one for each further --site."""
    gradients: Path | None = None
    """A file of the same kind and shape: the gradient of the model's loss at each row."""
    hook: tuple[str, ...] = ("imported",)
    """Hook name to store the rows under; repeat it for several arrays, in their order."""
    dtype: StoredDtype | None = None
    """Type in which to store the rows; by default the array's own type if it is one of these, else fp32."""
    format: str = "array"
    """'array', 'vllm' (hidden states that vLLM has written), or one that another installed package adds."""
    model: str | None = None
    """Of --format vllm: the model that made the hidden states."""
    revision: str | None = None
    """Of --format vllm: revision of a model from the hub."""
    layers: tuple[int, ...] = ()
    """Of --format vllm: the layers in the files, in the order in which they were asked for, like 1,2,3; i is
    the residual stream before block i."""
    ctx: Annotated[int | None, AtLeast(2)] = None
    """Of --format vllm: most tokens of a context, a file; by default as many as the longest file has."""
    keep_first: bool = False
    """Of --format vllm: keep position 0 of every context."""
    verify: bool = True
    """Of --format vllm: compare a file with a forward pass of the model, if it can be loaded."""
    device: str = "auto"
    """Of --format vllm: where that model runs."""
    shard_rows: int = 65_536
    """Rows in a shard file; a multiple of 32,768."""
    quiet: bool = False
    """No progress display."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "format", IMPORT_FORMATS.canonical(self.format, flag="--format"))
        other = {"array": "vllm", "vllm": "array"}.get(self.format)
        for field in dataclasses.fields(self):
            if other and field.name in _OF_FORMAT[other] and getattr(self, field.name) != field.default:
                flag = f"--{shown_name(field.name).replace('_', '-')}"
                raise UserError(f"{flag} goes with --format {other}, not with {self.format}; leave it out")
        if len(self.hook) != 1 + len(self.also):
            raise UserError(
                f"{1 + len(self.also)} arrays and {len(self.hook)} names of sites were given; pass one "
                "--site for each array"
            )
        if len(set(self.hook)) != len(self.hook):
            raise UserError(f"--site names the same hook twice: {', '.join(self.hook)}")
        if self.also and self.gradients is not None:
            raise UserError("--gradients goes with one array; import the arrays one by one")
        _check_shard_rows(self.shard_rows)
        if self.format == "vllm" and (self.model is None or not self.layers):
            raise UserError("--format vllm needs --model and --layers, which its files do not say")
        if len(set(self.layers)) != len(self.layers):
            raise UserError(f"--layers names a layer twice: {', '.join(map(str, self.layers))}")


def _check_shard_rows(shard_rows: int) -> None:
    if shard_rows < 1 or shard_rows % 32_768:
        raise UserError(f"shard_rows is {shard_rows}; it must be a multiple of 32,768")
