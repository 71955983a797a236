"""Which forms of SAEs of other libraries there are; a package adds one with the entry-point group below."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from saebench.core.registry import Registry

if TYPE_CHECKING:
    from saebench.formats.foreign import Foreign
    from saebench.runs.run import Run
    from saebench.saes.base import SAE


class Converted(Protocol):
    """An SAE in the form of another library, before it is written."""

    @property
    def architecture(self) -> str:
        """The other library's name for it."""

    @property
    def note(self) -> str | None:
        """What the other library will do differently, in one sentence."""


class Format(Protocol):
    """What the registered module or object has."""

    def read(self, directory: Path, *, k: int | None) -> Foreign:
        """The SAE in ``directory``, in our terms; ``k`` is for an SAE that does not say its own.

        Raises:
            UserError: no SAE there, a damaged one, or one that none of ours computes.
        """

    def convert(self, sae: SAE) -> Converted:
        """``sae`` in the form of the other library.

        Raises:
            UserError: the other library cannot compute what it does.
        """

    def write(self, converted: Converted, directory: Path, sae: SAE, run: Run) -> None:
        """Write what ``convert`` returned into an empty ``directory``; ``sae`` was loaded from ``run``."""


formats = Registry("a form of SAEs", "saebench.formats", {"saelens": "saebench.formats.saelens"})
"""Name -> module or object with the functions of `Format`."""
