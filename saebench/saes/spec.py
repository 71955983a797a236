"""The settings that every architecture has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from saebench.core.bounds import AtLeast
from saebench.core.errors import UserError
from saebench.core.settings import ADDED_LATER, DERIVED, Settings


@dataclass(frozen=True)
class SiteWidth:
    """A place whose activations an SAE reads or writes."""

    name: str
    """Hook name or module path; the part before ':' numbers the models if there are several."""
    width: int
    """Columns of its activations."""


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
    skip: bool = field(default=False, metadata=ADDED_LATER)
    """Give a transcoder a linear map from its input to its target beside the latents."""
    sites: tuple[SiteWidth, ...] = field(default=(), metadata=DERIVED)
    """What a transcoder or crosscoder reads, side by side along d_in; () for an SAE of one site."""
    targets: tuple[SiteWidth, ...] = field(default=(), metadata=DERIVED)
    """What it reconstructs, side by side along d_out; () for an SAE of one site, ``sites`` for a
    crosscoder."""

    input_norm: Literal["none", "layer_norm", "constant_norm"] = field(default="none", metadata=DERIVED)
    """How each row is normalized before the encoder, and its reconstruction brought back: SAEs of SAELens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.repeats:
            self._check_k()

    @property
    def is_transcoder(self) -> bool:
        """Whether the target is something else than the input."""
        return self.targets != self.sites

    @property
    def kind(self) -> str:
        """'SAE', 'transcoder' or 'crosscoder', for people."""
        return "crosscoder" if self.is_crosscoder else "transcoder" if self.is_transcoder else "SAE"

    @property
    def is_crosscoder(self) -> bool:
        """Whether several sites are read and reconstructed together."""
        return bool(self.sites) and self.targets == self.sites

    def check(self, *, batch_size: int, n_steps: int) -> None:
        """Raise a UserError when this SAE cannot be trained in that many batches of that many rows."""
        self._check_k()
        if self.skip and not self.is_transcoder:
            raise UserError(
                "--skip maps the input of a transcoder to its target, but no target is named; "
                "pass --target or leave --skip out"
            )

    def _check_k(self) -> None:
        if self.k > self.d_sae:
            raise UserError(
                f"k is {self.k} but d_sae is only {self.d_sae} latents; lower --k or raise --d-sae"
            )
