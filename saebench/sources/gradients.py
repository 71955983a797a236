"""The loss whose gradients are harvested, and the way back from it to a hook.

Shapes: B contexts, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LOGIT_BYTES = 1 << 28
"""fp32 logits computed at once; the way back holds about four times as much."""

_NOT_SCORED = -100


def contexts_at_once(n_positions: int, vocab_size: int) -> int:
    """How many contexts of ``n_positions`` tokens have logits within ``LOGIT_BYTES``; at least 1."""
    return max(1, LOGIT_BYTES // (4 * n_positions * vocab_size))


def summed_cross_entropy(logits_BTV: Tensor, tokens_BT: Tensor, length_B: Tensor) -> Tensor:
    """Sum over b and t < length_B[b] - 1 of -log p(tokens_BT[b, t + 1]), a scalar in nats.

    A sum, since a mean would make the gradient of a token depend on how many others there are.
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
    """d loss / d value for each of ``values``, tensors of the graph behind ``loss``; without those that it
    does not depend on."""
    if not loss.requires_grad:
        return {}
    found = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(values, found, strict=True) if gradient is not None}
