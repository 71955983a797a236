"""Settings, one small frozen dataclass a accepts_settings.

Command-line flags, ``--config file.toml``, keyword arguments in Python and the JSON saved beside every
result are all made from these classes: a field's name is the flag, its docstring the help text, its type
the check. An SAE's own settings live in the file of its architecture; ``ARCHITECTURES`` is the registry.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from saebench.core.errors import UserError
from saebench.core.settings import at_least

ARCHITECTURES = {
    "topk": "saebench.saes.topk:TopKSAE",
    "matching-pursuit": "saebench.saes.matching_pursuit:MatchingPursuitSAE",
    "mutual-choice": "saebench.saes.mutual_choice:MutualChoiceSAE",
    "feature-choice": "saebench.saes.feature_choice:FeatureChoiceSAE",
    "gradient": "saebench.saes.gradient:GradientSAE",
    "matryoshka": "saebench.saes.matryoshka:MatryoshkaSAE",
    "jumprelu": "saebench.saes.jumprelu:JumpReluSAE",
    "gated": "saebench.saes.gated:GatedSAE",
    "relu": "saebench.saes.relu:ReluSAE",
}
"""Name -> where the class is. A new architecture is one file in saebench/saes and one line here."""
ALIASES = {"batchtopk": "mutual-choice"}
"""Other accepted names; what is written to disk has the first."""

StoredDtype = Literal["bf16", "fp16", "fp32"]
ComputeDtype = Literal["auto", "bf16", "fp32"]
ForeignFormat = Literal["saelens"]
StoreFormat = Literal["parquet", "html", "delphi", "neuronpedia"]
SyntheticData = Literal["tree", "zipf", "readout", "superposition"]

DEMO_HOOK = "blocks.2.hook_resid_post"
MAX_SHARDS = 8192
"""Shards of a column; a reader maps each, and Linux gives a process 65,530 mappings for all columns."""


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """Run a model over text and keep its activations at one or more hooks."""

    out: Path
    """Directory of the activation cache."""
    model: str = "demo"
    """'demo', 'smollm2', a local Hugging Face folder, or a hub name."""
    text: str = "sotu"
    """'sotu', a local .txt, .jsonl or .parquet file, or the hub name of a data set."""
    hook: tuple[str, ...] = (DEMO_HOOK,)
    """Where to read activations, TransformerLens name; repeat for several hooks in one pass."""
    tokens: int = 2_000_000
    """Rows to keep for each hook (one row is one token); fewer when the text ends first."""
    ctx: int = 128
    """Tokens in a context."""
    gradients: bool = False
    """Also keep the gradient of the model's loss at every row; a gradient SAE needs it."""
    dtype: StoredDtype = "bf16"
    """Type in which activations are stored (and gradients, which are bf16 where these are fp16)."""
    batch_size: int = 32
    """Contexts in one forward pass."""
    keep_first: bool = False
    """Keep position 0 of every context (an attention sink of huge norm in most models)."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Begin every context with the BOS token; 'auto' does what the model's tokenizer does by itself."""
    revision: str | None = None
    """Revision of a model from the hub."""
    column: str = "text"
    """Column of the text that holds the documents."""
    split: str = "train"
    """Split of a data set from the hub."""
    shard_rows: int = 65_536
    """Rows in a shard file; a multiple of 32,768."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda' or 'cuda:1'."""
    quiet: bool = False
    """No progress display."""

    def __post_init__(self) -> None:
        at_least(self, tokens=1, ctx=2, batch_size=1, shard_rows=1)
        if self.gradients and not self.keep_first and self.ctx == 2:
            raise UserError(
                "--ctx 2 leaves no row with a gradient: position 0 is dropped and the last one predicts "
                "nothing; raise --ctx or pass --keep-first"
            )
        if not self.hook:
            raise UserError("no hook was named; pass --hook, for example --hook blocks.2.hook_resid_post")
        if len(set(self.hook)) != len(self.hook):
            raise UserError(f"--hook names the same hook twice: {', '.join(self.hook)}")
        if self.shard_rows % 32_768:
            raise UserError(f"shard_rows is {self.shard_rows}; it must be a multiple of 32,768")
        if self.tokens > MAX_SHARDS * self.shard_rows:
            enough = 32_768 * math.ceil(self.tokens / MAX_SHARDS / 32_768)
            raise UserError(
                f"{self.tokens:,} tokens in shards of {self.shard_rows:,} rows are more files than one "
                f"process can map; pass --shard-rows {enough}"
            )


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Make an activation cache of an array that exists already."""

    source: Path
    """A .npy file or a .safetensors file with one tensor, of shape [n, d_in]."""
    out: Path
    """Directory of the activation cache."""
    gradients: Path | None = None
    """A file of the same kind and shape: the gradient of the model's loss at each row."""
    hook: str = "imported"
    """The name under which the rows are found again."""
    dtype: StoredDtype | None = None
    """Type in which to store; by default the array's own when it is one of these, else fp32."""
    shard_rows: int = 65_536
    """Rows in a shard file; a multiple of 32,768."""
    quiet: bool = False
    """No progress display."""

    def __post_init__(self) -> None:
        if self.shard_rows < 1 or self.shard_rows % 32_768:
            raise UserError(f"shard_rows is {self.shard_rows}; it must be a multiple of 32,768")


@dataclass(frozen=True, kw_only=True)
class SaeSpec:
    """What every architecture has; the rest is in the file of each."""

    name: ClassVar[str] = ""
    # Whether a token may choose a latent again: then k may exceed d_sae, though not in training.
    repeats: ClassVar[bool] = False

    d_sae: int = 4096
    """Number of latents."""
    k: int = 32
    """Active latents a token."""

    def __post_init__(self) -> None:
        at_least(self, d_sae=1, k=1)
        if not self.repeats:
            self._check_k()

    def check(self, *, batch_size: int, n_steps: int) -> None:
        """Raise a UserError when this SAE cannot be trained in that many batches of that many rows."""
        self._check_k()

    def _check_k(self) -> None:
        if self.k > self.d_sae:
            raise UserError(
                f"k is {self.k} but d_sae is only {self.d_sae} latents; lower --k or raise --d-sae"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a sparse autoencoder on cached activations."""

    cache: Path
    """Directory of the activation cache."""
    out: Path
    """Directory of the run."""
    hook: str | None = None
    """Which hook of the cache; the first by default."""
    sae: str = "topk"
    """Architecture."""
    tokens: int = 5_000_000
    """Rows to train on, over as many epochs as that takes."""
    batch_size: int = 4096
    """Rows in a step."""
    lr: float | Literal["auto"] = "auto"
    """Peak learning rate; 'auto' goes by width: 1.6e-3 / sqrt(d_sae / 4096)."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises from 0."""
    decay: float = 0.3
    """Share of the steps, at the end, in which it falls to 0."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 0 switches clipping off."""
    normalize: bool = True
    """Train on inputs of unit mean variance per dimension; folded into the saved weights."""
    seed: int = 0
    """Seeds the initial weights, and the order of the rows unless order_seed does."""
    order_seed: int | None = None
    """Seeds the order of the rows; by default the seed does."""
    sweep: tuple[str, ...] = ()
    """NAME=VALUE,VALUE,...: train one SAE for each value in one pass over the cache, each in a directory of
    its own in --out; repeat for a grid, like --sweep sae=topk,relu --sweep k=16,32."""
    dtype: ComputeDtype = "auto"
    """Type of the matrix products; weights stay fp32. 'auto' is bf16 on a GPU and fp32 on a CPU."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    log_every: int = 50
    """Steps between lines of metrics."""
    resume: bool = False
    """Go on where an interrupted run of the same settings stopped."""
    memory: float = 1.0
    """GiB of memory that the shuffling reader may use."""
    tensorboard: bool = False
    """Also write TensorBoard event files into the run directory."""
    wandb: str | None = None
    """Also log to this Weights & Biases project."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda' or 'cuda:1'."""
    quiet: bool = False
    """No progress display."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sae", ALIASES.get(self.sae, self.sae))
        if self.sae not in ARCHITECTURES:
            raise UserError(f"--sae {self.sae} is not an architecture; there is {', '.join(ARCHITECTURES)}")
        at_least(self, tokens=1, batch_size=1, checkpoint_every=1, log_every=1)
        at_least(self, seed=0, grad_clip=0, warmup=0, decay=0)
        if self.order_seed is not None:
            at_least(self, order_seed=0)
        if self.tokens < self.batch_size:
            raise UserError(
                f"tokens is {self.tokens:,} but one step takes batch_size = {self.batch_size:,}; "
                "lower --batch-size or raise --tokens"
            )
        if self.lr != "auto" and not 0 < float(self.lr) < float("inf"):
            raise UserError(f"lr is {self.lr}; it must be 'auto' or a positive number")
        if self.warmup + self.decay > 1:
            raise UserError(
                f"warmup {self.warmup} and decay {self.decay} are shares of one run and exceed it"
            )
        if not 0.01 <= self.memory < float("inf"):
            raise UserError(f"memory is {self.memory} GiB; give at least 0.01")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Measure an SAE on rows that it was not trained on, and its effect on the model."""

    run: Path
    """A run directory, or a folder with sae.json and sae.safetensors."""
    cache: Path | None = None
    """Activation cache; by default the one the run was trained on."""
    hook: str | None = None
    """Which hook of the cache; by default the run's own."""
    model: str | None = None
    """Also splice the SAE into this model; 'cache' takes the one that made the cache."""
    revision: str | None = None
    """Revision of a model from the hub."""
    text: str | None = None
    """Read this text with the model instead of the cache's contexts."""
    column: str = "text"
    """Column of the text that holds the documents."""
    split: str = "train"
    """Split of a data set from the hub."""
    tokens: int = 200_000
    """Rows to measure on, at most."""
    rows: Literal["held-out", "all"] = "held-out"
    """'all' includes rows that the SAE was trained on."""
    inference: str | None = None
    """How latents are chosen, for SAEs that know several ways: plain, proxy, oracle."""
    batch_size: int = 32
    """Contexts in one forward pass of the model."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda' or 'cuda:1'."""
    quiet: bool = False
    """No progress display."""

    def __post_init__(self) -> None:
        at_least(self, tokens=2, batch_size=1)
        if self.text is not None and self.model is None:
            raise UserError(f"--text {self.text} needs a model to read it; add --model")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Put the evaluations of several runs into one table and one Pareto plot."""

    runs: tuple[Path, ...]
    """Run directories that were evaluated."""
    out: Path | None = None
    """Directory for compare.html, compare.png and compare.json; without it, the table alone."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("no run was named; compare takes one or more run directories")


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Encode a cache with an SAE and write a feature store."""

    run: Path
    """A run directory, or a folder with sae.json and sae.safetensors."""
    cache: Path
    """Activation cache."""
    out: Path
    """Directory of the feature store; an existing store gets a new generation."""
    also: tuple[Path, ...] = ()
    """Further runs to index in the same pass over the cache."""
    hook: str | None = None
    """Which hook of the cache; by default the run's own."""
    model: str = "cache"
    """Model for the logits: 'cache' is the one that made the cache, 'none' leaves logits out."""
    name: str | None = None
    """Name of the SAE in the store; by default the name of the run directory."""
    examples: int = 20
    """Top examples kept for each feature; as many random ones and negatives, and a fifth of each tenth."""
    window: int = 32
    """Tokens shown around an example."""
    batch_size: int = 8192
    """Rows encoded at once."""
    seed: int = 0
    """Seeds the choice of random examples."""
    with_context_index: bool = False
    """Also keep the activations by context, for pages that show a whole context."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda' or 'cuda:1'."""
    quiet: bool = False
    """No progress display."""

    def __post_init__(self) -> None:
        at_least(self, examples=1, window=1, batch_size=1, seed=0)
        if self.also and self.name is not None:
            raise UserError(f"name is {self.name!r}, but several runs are named; leave it out")


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Check a feature store: files, checksums, and that its tables agree with each other."""

    store: Path
    """Directory of the feature store."""
    run: Path | None = None
    """Also compare directions with the weights of this run, which is one of the store's SAEs."""
    cache: Path | None = None
    """With --run: also encode a sample of this cache again; it must be the one that was indexed."""
    model: str = "none"
    """With --cache: also compute a sample of the logits again; 'cache' is the model that made the cache."""
    quiet: bool = False
    """No progress display."""


@dataclass(frozen=True, kw_only=True)
class RebuildConfig:
    """Make the tables of a feature store again from its activations, also of one of an older format."""

    store: Path
    """Directory of the feature store."""
    quiet: bool = False
    """No progress display."""


@dataclass(frozen=True, kw_only=True)
class EffectsConfig:
    """Measure what the model's loss changes without each latent, as columns of a store's feature table."""

    store: Path
    """Directory of the feature store; it gets a new generation."""
    run: Path
    """The run directory of an SAE that is in the store."""
    cache: Path | None = None
    """Activation cache that it was indexed over; by default the one the run was trained on."""
    model: str = "cache"
    """Model that reads the contexts; 'cache' is the one that made the cache."""
    contexts: int = 4
    """Each latent is taken out of so many contexts, at most; 0 for first-order estimates alone."""
    sample: int = 256
    """Contexts of the cache that are looked at, at most."""
    rows: Literal["held-out", "all"] = "held-out"
    """'all' includes contexts that the SAE was trained on."""
    seed: int = 0
    """Seeds the choice of contexts."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda' or 'cuda:1'."""
    quiet: bool = False
    """No progress display."""

    def __post_init__(self) -> None:
        at_least(self, contexts=0, sample=1, seed=0)


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Explain the features of a store in words, and score the explanations on documents they never saw."""

    store: Path
    """Directory of the feature store, which gets a new generation."""
    sae: str | None = None
    """Which SAE of the store; the first by default."""
    provider: Literal["rules", "hf", "openai"] = "rules"
    """'rules' finds rules by counting, without any model; 'hf' asks a local model, 'openai' a server."""
    model: str | None = None
    """hf: 'demo', 'smollm2' or a local Hugging Face folder; openai: the name that the server knows."""
    base_url: str = "https://api.openai.com/v1"
    """openai: where the server is; any that speaks OpenAI's chat completions."""
    key_env: str = "OPENAI_API_KEY"
    """openai: environment variable that holds the key; it is stored nowhere."""
    features: tuple[str | int, ...] = ()
    """Which features, like 3,17,40-49; all that are not dead by default."""
    limit: int | None = None
    """At most so many features, those that fire most."""
    budget: int | None = None
    """Language models: stop before this many tokens are spent; what is finished is kept."""
    examples: int = 10
    """Language models: examples shown to explain a feature, and as many asked of each kind to score it."""
    window: int = 32
    """Language models: tokens shown of an example, at most."""
    concurrency: int = 8
    """openai: questions under way at once."""
    timeout: float = 60.0
    """openai: seconds to wait for an answer."""
    retries: int = 4
    """openai: further attempts at a question that failed for a while."""
    seed: int = 0
    """Seeds the choice of examples and the resampling of documents."""
    device: str = "auto"
    """hf: 'auto', 'cpu', 'cuda' or 'cuda:1'."""
    quiet: bool = False
    """No progress display."""

    def __post_init__(self) -> None:
        at_least(self, examples=1, window=4, concurrency=1, retries=0, seed=0)
        if not 0 < self.timeout < float("inf"):
            raise UserError(f"timeout is {self.timeout}; give a positive number of seconds")
        for name in ("limit", "budget"):
            if getattr(self, name) is not None:
                at_least(self, **{name: 1})
        if self.features and self.limit is not None:
            raise UserError("--features and --limit both say which features; leave one out")
        if self.provider == "rules" and self.model is not None:
            raise UserError(f"--model {self.model} goes with --provider hf or openai; rules need none")
        if self.provider != "rules" and not self.model:
            raise UserError(f"--provider {self.provider} asks a language model; name it with --model")
        if not self.base_url.startswith(("http://", "https://")):
            raise UserError(f"--base-url {self.base_url} is no address; it begins with http:// or https://")
        if {"@", "?"} & set(self.base_url):
            raise UserError(
                "--base-url may hold no password and no query, because it is stored; see --key-env"
            )


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a trained SAE in the form of another library."""

    run: Path
    """A run directory, or a folder with sae.json and sae.safetensors."""
    out: Path
    """Directory to write; it must be empty or not exist."""
    format: ForeignFormat = "saelens"
    """Whose form: 'saelens'."""
    quiet: bool = False
    """No progress display, as everywhere; an export has none."""


@dataclass(frozen=True, kw_only=True)
class StoreExportConfig:
    """Write what a feature store knows of an SAE in a form that others read."""

    store: Path
    """Directory of the feature store."""
    out: Path
    """Directory to write; it must be empty or not exist."""
    format: StoreFormat = "parquet"
    """'parquet' (the tables), 'html' (one page), 'delphi' (its latent cache), 'neuronpedia' (its JSON)."""
    sae: str | None = None
    """Which SAE of the store; the first by default."""
    features: tuple[str | int, ...] = ()
    """Only these features, like 3,17,40-49; all by default."""
    list: str | None = None
    """Only the features of this list, which people made in the explorer or with annotations.add_to_list."""
    quiet: bool = False
    """No progress display, as everywhere; an export has none."""

    def __post_init__(self) -> None:
        if self.features and self.list is not None:
            raise UserError(f"both features and the list {self.list!r} were named; give one of them")


@dataclass(frozen=True, kw_only=True)
class ImportSaeConfig:
    """Make a run directory of an SAE that another library trained."""

    source: Path
    """The other library's folder."""
    out: Path
    """Directory to write; it must be empty or not exist."""
    format: ForeignFormat = "saelens"
    """Whose form: 'saelens'."""
    k: int | None = None
    """Active latents a token, for an SAE that does not say it (a note: what is computed stays the same)."""
    quiet: bool = False
    """No progress display, as everywhere; an import has none."""

    def __post_init__(self) -> None:
        if self.k is not None:
            at_least(self, k=1)


@dataclass(frozen=True, kw_only=True)
class SynthConfig:
    """Train SAEs on data whose features are known, compare them with the truth, test the papers' claims."""

    out: Path = Path("synth")
    """Directory for the data, the runs and the results; run again to go on after an interruption."""
    full: bool = False
    """The whole suite: more rows, and all nine levels of the tree; about an hour on 2 CPU cores."""
    data: tuple[SyntheticData, ...] = ("tree", "zipf", "readout", "superposition")
    """Which data; repeat for several."""
    architectures: tuple[str, ...] = ()
    """Which architectures; repeat for several. All by default."""
    seeds: int = 3
    """SAEs of each kind, which differ in their initial weights."""
    tokens: int | None = None
    """Rows to train each SAE on; by default what the suite takes for each data."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda' or 'cuda:1'."""
    quiet: bool = False
    """No progress display."""

    def __post_init__(self) -> None:
        at_least(self, seeds=1)
        if self.tokens is not None:
            at_least(self, tokens=10_000)
        for name in self.architectures:
            if ALIASES.get(name, name) not in ARCHITECTURES:
                known = ", ".join(ARCHITECTURES)
                raise UserError(f"--architectures {name} is not an architecture; there is {known}")
        for flag, values in (("data", self.data), ("architectures", self.architectures)):
            if len(set(values)) != len(values):
                raise UserError(f"--{flag} names the same thing twice: {', '.join(values)}")
        if not self.data:
            raise UserError("no data was named; leave --data out for all of them")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Time training steps against others and against the bare matrix product, in turns.

    On a GPU: encoders and steps at three fixed sizes, beside plain torch and whichever of sae-lens,
    eai-sparsify and dictionary-learning can be imported. With --cpu: ours and SAELens's. With --store: the
    feature store.
    """

    cpu: bool = False
    """Measure on the CPU, even where there is a GPU."""
    store: bool = False
    """Measure the feature store instead: how long it takes to make, its size, and how fast it answers."""
    store_activations: int = 60_000_000
    """With --store: activations of the made-up store."""
    store_features: int = 16_384
    """With --store: number of latents."""
    peers: Path = Path(".venv-peers")
    """With --cpu: virtual environment with sae-lens, as 'make peers' builds it; without one its rows stay
    empty."""
    d_in: int = 256
    """With --cpu: width of an activation."""
    d_sae: int = 4096
    """With --cpu: number of latents."""
    k: int = 32
    """With --cpu: active latents a token."""
    batch_size: int = 4096
    """With --cpu: rows in a step."""
    threads: int = 2
    """With --cpu: threads of each process."""
    turns: int = 5
    """How often everyone is measured, twice each time."""
    out: Path | None = None
    """JSON file for the results."""
    quiet: bool = False
    """No progress display."""

    def __post_init__(self) -> None:
        at_least(self, d_in=1, batch_size=1, threads=1, turns=1, store_activations=1)
        SaeSpec(d_sae=self.d_sae, k=self.k)
        SaeSpec(d_sae=self.store_features, k=self.k)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Walk the whole road on a small scale: harvest, train, eval, index, and how to look at the features."""

    all: bool = False
    """Train all main architectures on the same rows, in one pass, and compare them."""
    out: Path = Path("demo")
    """Directory for the cache, the run and the feature store; run again to go on after an interruption."""
    model: str = "demo"
    """'demo', 'smollm2', a local Hugging Face folder, or a hub name."""
    text: str = "sotu"
    """'sotu', a local .txt, .jsonl or .parquet file, or the hub name of a data set."""
    hook: str | None = None
    """Where to read activations; by default the residual stream in the middle of the model."""
    harvest_tokens: int = 600_000
    """Rows to harvest; fewer when the text ends first."""
    ctx: int = 128
    """Tokens in a context."""
    d_sae: int = 2048
    """Number of latents."""
    k: int = 32
    """Active latents a token."""
    tokens: int | None = None
    """Rows to train on; by default 3,200,000, and half of that with --all."""
    batch_size: int = 4096
    """Rows in a training step."""
    eval_tokens: int = 30_000
    """Held-out rows to measure on, at most."""
    seed: int = 0
    """Seeds the initial weights and the order of the rows."""
    explore: bool = False
    """Open the explorer at the end."""
    port: int = 8501
    """Port of the explorer."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda' or 'cuda:1'."""
    quiet: bool = False
    """No progress display."""

    def __post_init__(self) -> None:
        at_least(self, harvest_tokens=1, ctx=2, batch_size=1, eval_tokens=2, seed=0)
        if self.tokens is not None:
            at_least(self, tokens=1)
        SaeSpec(d_sae=self.d_sae, k=self.k)


def architecture(name: str) -> Any:
    """The SAE class registered as ``name``; its ``Spec`` attribute is its dataclass of settings."""
    name = ALIASES.get(name, name)
    if name not in ARCHITECTURES:
        raise UserError(f"{name!r} is not an SAE architecture; there is {', '.join(ARCHITECTURES)}")
    module, _, attribute = ARCHITECTURES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
