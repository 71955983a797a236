"""The settings that every architecture has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from saebench.core.bounds import AtLeast
from saebench.core.errors import UserError
from saebench.core.settings import Settings


@dataclass(frozen=True, kw_only=True)
class SaeSpec(Settings):
    """Settings that every architecture has. Those of a single architecture are in its file."""

    name: ClassVar[str] = ""
    # Whether a token may choose a latent again: then k may exceed d_sae, though not in training.
    repeats: ClassVar[bool] = False

    d_sae: Annotated[int, AtLeast(1)] = 4096
    """Number of latents."""
    k: Annotated[int, AtLeast(1)] = 32
    """Active latents per token."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
