"""``InferenceMode``: encoding with an SAE in one of its inference modes (plain, proxy, oracle).

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
    """How latents are selected in one evaluation, and how many picks differ from those of the default mode.

    Raises:
        UserError: the SAE does not have the mode ``inference``.
    """

    def __init__(self, sae: SAE, inference: str | None) -> None:
        known = sae.inferences
        if inference is not None and not known:
            raise UserError(
                f"--inference {inference}: a {sae.spec.name} SAE has only one inference mode; "
                "leave --inference out"
            )
        if inference is not None and inference not in known:
            raise UserError(
                f"--inference {inference} is not an inference mode of a {sae.spec.name} SAE; "
                f"choose one of {', '.join(known)}"
            )
        self.sae = sae
        self.inference = inference or (known[0] if known else None)
        self.is_default = not known or self.inference == known[0]
        self.needs_gradients = sae.needs_gradients(self.inference)
        self._changed, self._picks = 0, 0

    @property
    def picks_changed(self) -> float | None:
        """Share of the measured picks that the default mode does not make; None in the default mode."""
        return None if self.is_default else self._changed / max(self._picks, 1)

    @torch.no_grad()
    def encode(self, x_ND: Tensor, gradient_ND: Tensor | None = None) -> SparseCodes:
        """Codes of rows [N, d_in]; ``gradient_ND`` [N, d_out] is required if ``needs_gradients``."""
        x_ND = x_ND.to(self.sae.W_dec.device, torch.float32)
        if self.is_default:
            return self.sae.encode(x_ND)
        if self.needs_gradients:
            return self.sae.encode(x_ND, inference=self.inference, gradient=gradient_ND)
        return self.sae.encode(x_ND, inference=self.inference)

    def reconstruct(self, x_ND: Tensor, gradient_ND: Tensor | None = None) -> Tensor:
        """y_hat [N, d_out] of rows."""
        x_ND = x_ND.to(self.sae.W_dec.device, torch.float32)
        return self.sae.decode(self.encode(x_ND, gradient_ND), x_ND)

    def measure(
        self,
        meter: ReconstructionMeter,
        x_ND: Tensor,
        gradient_ND: Tensor | None = None,
        *,
        target_NE: Tensor | None = None,
    ) -> Tensor:
        """Add rows to the ``meter``, count their changed picks, and return y_hat [N, d_out]."""
        codes = self.encode(x_ND, gradient_ND)
        if not self.is_default:
            default = self.sae.encode(x_ND.to(codes.values.device))
            changed, picks = self.sae.changed_picks(codes, default)
            self._changed += int(changed)
            self._picks += int(picks)
        return meter.update(x_ND, codes, target_NE=target_NE)
