"""The registry of SAE formats of other libraries; packages add formats with an entry point."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from saebench.core.registry import Registry

if TYPE_CHECKING:
    from saebench.formats.foreign import Foreign
    from saebench.runs.run import Run
    from saebench.saes.base import SAE


class Converted(Protocol):
    """An SAE in the format of another library, before it is written."""

    @property
    def architecture(self) -> str:
        """The other library's name for the architecture."""

    @property
    def note(self) -> str | None:
        """What the other library computes differently, in one sentence; None if nothing."""


class Format(Protocol):
    """The functions that a registered module or object must have."""

    def read(self, directory: Path, *, k: int | None) -> Foreign:
        """The SAE in ``directory``; ``k`` is used if the folder does not record it.

        Raises:
            UserError: there is no SAE, it is damaged, or no architecture of saebench computes it.
        """

    def convert(self, sae: SAE) -> Converted:
        """``sae`` in the format of the other library.

        Raises:
            UserError: the other library cannot compute what this SAE computes.
        """

    def write(self, converted: Converted, directory: Path, sae: SAE, run: Run) -> None:
        """Write what ``convert`` returned into an empty ``directory``; ``sae`` was loaded from ``run``."""


@runtime_checkable
class SetFormat(Protocol):
    """The functions of a format whose folders hold several SAEs, one per layer; it has them in place of those
    of `Format`."""

    def read_set(self, directory: Path, *, k: int | None) -> Iterable[tuple[str, Foreign]]:
        """The SAEs in ``directory``, each with a name for its folder; ``k`` as in `Format.read`.

        Raises:
            UserError: there is no set, a file is damaged, or no architecture of saebench computes an SAE.
        """

    def convert_set(self, runs: Sequence[Run]) -> Converted:
        """The SAEs of ``runs``, checked, in the format of the other library.

        Raises:
            UserError: the other library cannot compute an SAE, or the SAEs are not a whole set.
        """

    def write_set(self, converted: Any, directory: Path) -> None:
        """Write what ``convert_set`` returned into an empty ``directory``."""


formats = Registry(
    "a format of SAEs",
    "saebench.formats",
    {"saelens": "saebench.formats.saelens", "circuit-tracer": "saebench.formats.circuit_tracer"},
)
"""Name -> module or object with the functions of `Format` or of `SetFormat`."""
