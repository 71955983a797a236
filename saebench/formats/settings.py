"""Settings of translating SAEs from and to other libraries' forms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from saebench.core.bounds import AtLeast
from saebench.core.settings import Settings
from saebench.formats.registry import formats


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Settings):
    """Write a trained SAE in the form of another library."""

    run: Path
    """A run directory, or a folder with sae.json and sae.safetensors."""
    out: Path
    """Directory to write; it must be empty or not exist."""
    format: str = "saelens"
    """Whose form: 'saelens', or one that another installed package adds."""
    quiet: bool = False
    """No progress display, as everywhere; an export has none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        formats.canonical(self.format, flag="--format")


@dataclass(frozen=True, kw_only=True)
class ImportSaeConfig(Settings):
    """Make a run directory of an SAE that another library trained."""

    source: Path
    """The other library's folder."""
    out: Path
    """Directory to write; it must be empty or not exist."""
    format: str = "saelens"
    """Whose form: 'saelens', or one that another installed package adds."""
    k: Annotated[int | None, AtLeast(1)] = None
    """Active latents a token, for an SAE that does not say it (a note: what is computed stays the same)."""
    quiet: bool = False
    """No progress display, as everywhere; an import has none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        formats.canonical(self.format, flag="--format")
