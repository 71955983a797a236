"""Edits of latents inside a model: an SAE is spliced in at its hook, and its error term is kept.

With codes z of an activation x and z' after the edit, the activation y at the target (x itself for an SAE)
becomes

    y' = y + decode(z') - decode(z),

so what the SAE does not explain passes unchanged, and no edit leaves the model's logits as they are.

Shapes: B = 1 context, T positions, P edited positions, N rows, D = d_in, E = d_out, F latents, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.analysis.attach import AttachedSAE
from saebench.core.codes import SparseCodes
from saebench.core.errors import UserError
from saebench.saes.base import SAE

MODES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "add": lambda values, strength: values + strength,
    "clamp": lambda values, strength: torch.full_like(values, strength),
    "scale": lambda values, strength: values * strength,
}
"""The functions that compute the new value of a latent from its value and the strength."""


@dataclass(frozen=True)
class LatentEdit:
    """A change of the values of ``features`` at some positions."""

    features: list[int]
    mode: str
    strength: float
    positions: list[int]
    onwards: range | None = None
    """Positions after the prompt that are also edited, when they are generated."""

    def spliced(self, attached: AttachedSAE, ids_1T: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
        """The ``edit`` argument of `Model.logits` for one context."""
        length, splice = ids_1T.shape[1], attached.splice
        keep_BT = torch.zeros(1, length, dtype=torch.bool)
        keep_BT[0, self.positions] = True
        if self.onwards is not None:
            keep_BT[0, [position for position in self.onwards if position < length]] = True
        clean_BTD = attached.activations(ids_1T)[None] if splice.needs_clean else None
        return splice.edits(
            keep_BT, lambda x_PD, y_PE: self.apply(attached.sae, x_PD, y_PE), clean_BTD=clean_BTD
        )

    def apply(self, sae: SAE, x_PD: Tensor, y_PE: Tensor) -> Tensor:
        """y + decode(z') - decode(z) [P, E] float32 for rows x; decoding is linear except for b_dec."""
        codes = sae.encode(x_PD.to(sae.W_dec.device))
        values_PF = latent_values(codes, self.features)
        change_PF = MODES[self.mode](values_PF, self.strength) - values_PF
        return y_PE.float() + (change_PF @ sae.W_dec[self.features]).to(y_PE.device)


def latent_values(codes: SparseCodes, features: Sequence[int]) -> Tensor:
    """The values [N, F] of a few latents in ``codes`` of N rows; repeated picks are summed."""
    slot_M = torch.full((codes.d_sae,), -1, device=codes.values.device)
    slot_M[list(features)] = torch.arange(len(features), device=slot_M.device)
    row, index, value = codes.coo()
    slot = slot_M[index.long()]
    found = slot >= 0
    values = value.new_zeros(codes.n_rows * len(features))
    values.index_add_(0, row[found] * len(features) + slot[found], value[found])
    return values.view(codes.n_rows, len(features))


def logits_of(attached: AttachedSAE, ids: Sequence[int], edit: LatentEdit | None = None) -> Tensor:
    """Logits [1, T, V] of a prompt, with an edit if given; raises a UserError for NaN or infinity."""
    ids_1T = torch.tensor([ids])
    edits = edit.spliced(attached, ids_1T) if edit is not None else None
    logits_BTV = attached.model.logits(ids_1T, edit=edits)
    if not logits_BTV.isfinite().all():
        if edit is None:
            raise UserError(
                f"the predictions of {attached.model.name} hold NaN or infinity on this text; "
                "load the model in fp32, or download its weights again"
            )
        raise UserError(
            f"with strength {edit.strength:g} the predictions hold NaN or infinity; give a smaller strength"
        )
    return logits_BTV
