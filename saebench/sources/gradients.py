"""The loss whose gradients are harvested, and its gradients with respect to activations.

Shapes: B contexts, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LOGIT_BYTES = 1 << 28
"""Bytes of fp32 logits computed at once; the backward pass holds about four times as much."""

_NOT_SCORED = -100


def contexts_at_once(n_positions: int, vocab_size: int) -> int:
    """The number of contexts of ``n_positions`` tokens whose logits fit into ``LOGIT_BYTES``; at least 1."""
    return max(1, LOGIT_BYTES // (4 * n_positions * vocab_size))


def summed_cross_entropy(logits_BTV: Tensor, tokens_BT: Tensor, length_B: Tensor) -> Tensor:
    """Sum over b and t < length_B[b] - 1 of -log p(tokens_BT[b, t + 1]), a scalar in nats.

    It is a sum because with a mean the gradient of a token would depend on the number of other tokens.
    """
    n_positions = tokens_BT.shape[1]
    has_next_BT = torch.arange(n_positions) + 1 < length_B.cpu()[:, None]
    next_BT = torch.where(has_next_BT, tokens_BT.cpu().long().roll(-1, dims=1), _NOT_SCORED)
    return torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1).float(),
        next_BT.flatten().to(logits_BTV.device),
        ignore_index=_NOT_SCORED,
        reduction="sum",
    )


def gradients_of(loss: Tensor, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """d loss / d value for each of ``values``, tensors of the graph that computed ``loss``.

    Values that ``loss`` does not depend on are left out.
    """
    if not loss.requires_grad:
        return {}
    found = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(values, found, strict=True) if gradient is not None}
