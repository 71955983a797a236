"""What follows the last block: the final norm's scale, and the direct effect of directions on the logits.

Shapes: B contexts, T positions, D = d_model, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saebench.core.errors import UserError

if TYPE_CHECKING:
    from saebench.sources.native_path import NativePath

_EPSILON = 1e-5
_CHECKED_TOKENS = 8


@dataclass(frozen=True)
class Readout:
    """The final norm and the unembedding of a model.

    Args:
        head: the unembedding, a linear map.
        norm: the final norm; None when there is none.
        rms: the norm does not subtract the mean.
        gain_offset: added to the norm's weight.
        projection: a linear map between norm and unembedding.
        logit_scale: the logits are this multiple of what the unembedding gives.
        soft_cap: the logits are then soft_cap * tanh(logits / soft_cap); None when they are not.
    """

    head: nn.Module
    norm: nn.Module | None
    rms: bool
    gain_offset: float = 0.0
    projection: nn.Module | None = None
    logit_scale: float = 1.0
    soft_cap: float | None = None

    def unembedding(self) -> Tensor:
        """U [D, V], see `Model.unembedding`."""
        W_DV = _weight(self.head).T
        if self.projection is not None:
            W_DV = _weight(self.projection).T @ W_DV
        if getattr(self.norm, "weight", None) is not None:
            assert self.norm is not None
            W_DV = (_weight(self.norm) + self.gain_offset)[:, None] * W_DV
        if self.norm is not None and not self.rms:
            W_DV = W_DV - W_DV.mean(dim=0, keepdim=True)
        return self.logit_scale * (W_DV - W_DV.mean(dim=1, keepdim=True))

    def scale(self, x_BTD: Tensor) -> Tensor:
        """[B, T] float32: what the final norm divides ``x_BTD`` by; 1 without a final norm."""
        x_BTD = x_BTD.float()
        if self.norm is None:
            return torch.ones(x_BTD.shape[:2], device=x_BTD.device)
        epsilons = (getattr(self.norm, name, None) for name in ("variance_epsilon", "eps"))
        epsilon = next((value for value in epsilons if value is not None), _EPSILON)
        square = x_BTD.square().mean(-1) if self.rms else x_BTD.var(-1, unbiased=False)
        return (square + epsilon).sqrt()


def native_readout(path: NativePath) -> Readout:
    """The `Readout` of a model of a known family."""
    family = path.family
    assert family is not None
    text = path.text
    cap = getattr(family.config, family.soft_cap, None) if family.soft_cap else None
    return Readout(
        head=path.module.get_output_embeddings(),
        norm=text.get_submodule(family.ln_final) if family.ln_final else None,
        rms=family.rms,
        gain_offset=family.gain_offset,
        projection=getattr(text, family.projection, None) if family.projection else None,
        logit_scale=family.number(family.logit_scale) / family.number(family.logit_divisor),
        soft_cap=cap,
    )


def bridge_readout(bridge: Any, name: str) -> Readout:
    """The `Readout` of a model that only TransformerLens knows.

    Raises:
        UserError: a model without a final norm or unembedding.
    """
    cfg, head = bridge.cfg, bridge.original_model.get_output_embeddings()
    norm = getattr(getattr(bridge, "ln_final", None), "original_component", None)
    if norm is None or head is None:
        raise UserError(
            f"{name} has no final norm followed by an unembedding, so logits cannot be read from the "
            "residual stream; use what runs the model instead, such as attribution by='gradient'"
        )
    cap = float(getattr(cfg, "output_logits_soft_cap", -1) or -1)
    return Readout(
        head=head,
        norm=norm,
        rms=bool(getattr(cfg, "uses_rms_norm", False)),
        gain_offset=float(getattr(cfg, "rmsnorm_uses_offset", False)),
        logit_scale=float(getattr(cfg, "logit_scale", None) or 1)
        / float(getattr(cfg, "logits_scaling", None) or 1),
        soft_cap=cap if cap > 0 else None,
    )


def require_linear(U_DV: Tensor, readout: Readout, x_TD: Tensor, logits_TV: Tensor, name: str) -> None:
    """Raise a UserError unless (x / s) @ U gives the logits up to a constant per token and one per position.

    ``x_TD`` is the residual stream after the last block, on some tokens.
    """
    x_TD, logits_TV = x_TD.float().cpu(), logits_TV.float().cpu()
    read_TV = x_TD / readout.scale(x_TD[None])[0, :, None] @ U_DV
    logits_TV = logits_TV - logits_TV.mean(-1, keepdim=True)
    read_TV, logits_TV = (values - values.mean(0) for values in (read_TV, logits_TV))
    tolerance = 0.01 if next(readout.head.parameters()).dtype == torch.float32 else 0.1
    if float((read_TV - logits_TV).norm()) > tolerance * float(logits_TV.norm()) + 1e-6:
        raise UserError(
            f"the logits of {name} are not linear in the residual stream given the scale of the final "
            "norm, so they cannot be read from it; use what runs the model instead, such as attribution "
            "by='gradient'"
        )


def _weight(module: nn.Module) -> Tensor:
    weight: Any = module.weight
    return weight.detach().float().cpu()  # type: ignore[no-any-return]
