"""Settings of the synthetic suite."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from saebench.core.bounds import AtLeast
from saebench.core.errors import UserError
from saebench.core.settings import Settings
from saebench.saes.registry import architectures

SyntheticData = Literal["tree", "zipf", "readout", "superposition"]


@dataclass(frozen=True, kw_only=True)
class SynthConfig(Settings):
    """Train SAEs on synthetic data with known features, measure recovery, and test the papers' claims."""

    out: Path = Path("synth")
    """Directory for the data, the runs and the results; run the command again to resume it."""
    full: bool = False
    """The whole suite: more rows, and all nine levels of the tree; about an hour on 2 CPU cores."""
    data: tuple[SyntheticData, ...] = ("tree", "zipf", "readout", "superposition")
    """Data sets; repeat for several."""
    architectures: tuple[str, ...] = ()
    """Architectures; repeat for several. By default all."""
    seeds: Annotated[int, AtLeast(1)] = 3
    """SAEs per architecture and data set; they differ in their initial weights."""
    tokens: Annotated[int | None, AtLeast(10_000)] = None
    """Rows to train each SAE on; by default a number that depends on the data set."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda' or 'cuda:1'."""
    quiet: bool = False
    """No progress display."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.architectures:
            architectures.canonical(name, flag="--architectures")
        for flag, values in (("data", self.data), ("architectures", self.architectures)):
            if len(set(values)) != len(values):
                raise UserError(f"--{flag} names the same value twice: {', '.join(values)}; name each once")
        if not self.data:
            raise UserError("no data was named; leave --data out for all of them")
