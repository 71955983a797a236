"""Settings of importing and exporting SAEs in the formats of other libraries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from saebench.core.bounds import AtLeast
from saebench.core.errors import UserError
from saebench.core.settings import Settings
from saebench.formats.registry import formats


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Settings):
    """Write a trained SAE in the format of another library."""

    run: Path
    """A run directory, or a folder with sae.json and sae.safetensors."""
    also: tuple[Path, ...] = ()
    """Further runs, for a format that holds several SAEs; without --out, the last path is the directory to
    write."""
    out: Path | None = None
    """Directory to write; it must be empty or not exist."""
    format: str = "saelens"
    """Format: 'saelens', 'circuit-tracer' (transcoders, one run per layer), or one that another installed
    package adds."""
    quiet: bool = False
    """No effect: an export has no progress display."""

    def __post_init__(self) -> None:
        super().__post_init__()
        formats.canonical(self.format, flag="--format")
        if self.out is None and self.also:
            object.__setattr__(self, "out", self.also[-1])
            object.__setattr__(self, "also", self.also[:-1])
        if self.out is None:
            raise UserError("export needs a directory to write; name it after the run, or with --out")

    @property
    def runs(self) -> tuple[Path, ...]:
        """All runs."""
        return (self.run, *self.also)

    @property
    def directory(self) -> Path:
        """The directory to write."""
        assert self.out is not None
        return self.out


@dataclass(frozen=True, kw_only=True)
class ImportSaeConfig(Settings):
    """Make a run directory from an SAE that another library trained."""

    source: Path
    """Folder that the other library wrote."""
    out: Path
    """Directory to write; it must be empty or not exist. Of a set, each SAE gets a folder in it."""
    format: str = "saelens"
    """Format: 'saelens', 'circuit-tracer' (a set of transcoders, one per layer), or one that another
    installed package adds."""
    k: Annotated[int | None, AtLeast(1)] = None
    """Active latents per token, if the folder does not say it; it is recorded and does not change the SAE."""
    quiet: bool = False
    """No effect: an import has no progress display."""

    def __post_init__(self) -> None:
        super().__post_init__()
        formats.canonical(self.format, flag="--format")
