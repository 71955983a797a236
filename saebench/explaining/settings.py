"""Settings of explaining features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from saebench.core.bounds import Above, AtLeast, Seed
from saebench.core.errors import UserError
from saebench.core.settings import Settings


@dataclass(frozen=True, kw_only=True)
class ExplainConfig(Settings):
    """Explain the features of a store in words, and score the explanations on held-out documents."""

    store: Path
    """Directory of the feature store; a new generation is written."""
    sae: str | None = None
    """Which SAE of the store; the first by default."""
    provider: Literal["rules", "hf", "openai"] = "rules"
    """'rules' finds rules by counting, without a model; 'hf' asks a local model, 'openai' a server."""
    model: str | None = None
    """hf: 'demo', 'smollm2' or a local Hugging Face folder; openai: the name that the server knows."""
    base_url: str = "https://api.openai.com/v1"
    """openai: address of the server; any server with OpenAI's chat completions API."""
    key_env: str = "OPENAI_API_KEY"
    """openai: environment variable that holds the key; the key is not stored."""
    features: tuple[str | int, ...] = ()
    """Which features, like 3,17,40-49; by default all that are not dead."""
    limit: Annotated[int | None, AtLeast(1)] = None
    """Explain at most this many features, those with the highest activation density."""
    budget: Annotated[int | None, AtLeast(1)] = None
    """Language models: stop before using more than this many tokens; finished explanations are kept."""
    examples: Annotated[int, AtLeast(1)] = 10
    """Language models: examples shown to explain a feature, and examples of each kind to score it."""
    window: Annotated[int, AtLeast(4)] = 32
    """Language models: tokens shown per example, at most."""
    concurrency: Annotated[int, AtLeast(1)] = 8
    """openai: requests sent at the same time."""
    timeout: Annotated[float, Above(0)] = 60.0
    """openai: seconds to wait for an answer."""
    retries: Annotated[int, AtLeast(0)] = 4
    """openai: retries of a request that failed with a temporary error."""
    seed: Seed = 0
    """Seeds the choice of examples and the resampling of documents."""
    device: str = "auto"
    """hf: 'auto', 'cpu', 'cuda' or 'cuda:1'."""
    quiet: bool = False
    """No progress display."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features and self.limit is not None:
            raise UserError("--features and --limit both say which features; leave one out")
        if self.provider == "rules" and self.model is not None:
            raise UserError(f"--model {self.model} goes with --provider hf or openai; rules need none")
        if self.provider != "rules" and not self.model:
            raise UserError(f"--provider {self.provider} asks a language model; name it with --model")
        if not self.base_url.startswith(("http://", "https://")):
            raise UserError(
                f"--base-url {self.base_url} is not an address; it must begin with http:// or https://"
            )
        if {"@", "?"} & set(self.base_url):
            raise UserError(
                "--base-url may hold no password and no query, because it is stored; see --key-env"
            )
