"""The way in which an SAE is read: by default, or as --inference says.

Shapes: N rows, D = d_in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saebench.core.errors import UserError
from saebench.evaluation.reconstruction import ReconstructionMeter

if TYPE_CHECKING:
    from saebench.core.codes import SparseCodes
    from saebench.saes.base import SAE


class InferenceMode:
    """How latents are chosen in one evaluation, and how many of the picks are others than by default.

    Raises:
        UserError: the SAE does not know this ``inference``.
    """

    def __init__(self, sae: SAE, inference: str | None) -> None:
        known = sae.inferences
        if inference is not None and not known:
            raise UserError(
                f"--inference {inference}: a {sae.spec.name} SAE chooses its latents in one way only; "
                "leave --inference out"
            )
        if inference is not None and inference not in known:
            raise UserError(
                f"--inference {inference} is not a way in which a {sae.spec.name} SAE chooses its latents; "
                f"there is {', '.join(known)}"
            )
        self.sae = sae
        self.inference = inference or (known[0] if known else None)
        self.is_default = not known or self.inference == known[0]
        self.needs_gradients = sae.needs_gradients(self.inference)
        self._changed, self._picks = 0, 0

    @property
    def picks_changed(self) -> float | None:
        """Share of the measured picks that the default way would not have made; None if this is that way."""
        return None if self.is_default else self._changed / max(self._picks, 1)

    @torch.no_grad()
    def encode(self, x_ND: Tensor, gradient_ND: Tensor | None = None) -> SparseCodes:
        """Codes of rows [N, d_in]; ``gradient`` [N, d_in] where ``needs_gradients``."""
        x_ND = x_ND.to(self.sae.W_dec.device, torch.float32)
        if self.is_default:
            return self.sae.encode(x_ND)
        if self.needs_gradients:
            return self.sae.encode(x_ND, inference=self.inference, gradient=gradient_ND)
        return self.sae.encode(x_ND, inference=self.inference)

    def reconstruct(self, x_ND: Tensor, gradient_ND: Tensor | None = None) -> Tensor:
        """x_hat [N, d_in] of rows."""
        return self.sae.decode(self.encode(x_ND, gradient_ND))

    def measure(self, meter: ReconstructionMeter, x_ND: Tensor, gradient_ND: Tensor | None = None) -> Tensor:
        """Give rows to the ``meter`` and count their changed picks; returns x_hat [N, d_in]."""
        codes = self.encode(x_ND, gradient_ND)
        if not self.is_default:
            default = self.sae.encode(x_ND.to(codes.values.device))
            changed, picks = self.sae.changed_picks(codes, default)
            self._changed += int(changed)
            self._picks += int(picks)
        return meter.update(x_ND, codes)
