"""Settings of evaluating SAEs and comparing evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from saebench.core.bounds import AtLeast
from saebench.core.errors import UserError
from saebench.core.settings import Settings


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Settings):
    """Measure an SAE on rows that it was not trained on, and its effect on the model."""

    run: Path
    """A run directory, or a folder with sae.json and sae.safetensors."""
    cache: Path | None = None
    """Activation cache; by default the one the run was trained on."""
    hook: str | None = None
    """Site of the cache; by default the one that the run was trained on."""
    together: tuple[Path, ...] = ()
    """Runs that are put into the model in the same passes, for example the transcoders of all other layers;
    the result is written to eval-together.json."""
    model: str | None = None
    """Also put the SAE's reconstruction into this model and measure the model's loss; 'cache' is the model
    that made the cache."""
    revision: str | None = None
    """Revision of a model from the hub."""
    text: str | None = None
    """Run the model on this text instead of on the cache's contexts."""
    column: str = "text"
    """Column of the text that holds the documents: texts, lists of token ids, or chats."""
    split: str = "train"
    """Split of a data set."""
    text_config: str | None = None
    """Configuration of a data set that has several."""
    tokens: Annotated[int, AtLeast(2)] = 200_000
    """Rows to measure on, at most."""
    rows: Literal["held-out", "all"] = "held-out"
    """'all' includes rows that the SAE was trained on."""
    inference: str | None = None
    """How latents are chosen, for SAEs with several inference modes: plain, proxy, oracle."""
    batch_size: Annotated[int, AtLeast(1)] = 32
    """Contexts in one forward pass of the model."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda' or 'cuda:1'."""
    quiet: bool = False
    """No progress display."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text is not None and self.model is None:
            raise UserError(f"--text {self.text} needs a model that reads the text; add --model")
        if self.together and self.model is None:
            raise UserError("--together names runs to put into a model with this one; add --model")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Settings):
    """Put the evaluations of several runs into one table and one Pareto plot."""

    runs: tuple[Path, ...]
    """Run directories that were evaluated."""
    out: Path | None = None
    """Directory for compare.html, compare.png and compare.json; without it, only the table is printed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs:
            raise UserError("no run was named; compare takes one or more run directories")
