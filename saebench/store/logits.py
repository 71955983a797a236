"""Direct effect of each latent on the model's next-token logits: W_dec @ W_U.

For a transcoder or crosscoder, W_dec is the part that writes the last target in the residual stream.

Shapes: M = d_sae latents, D = d_model, V tokens, B latents of a block, J tokens kept of each sign.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saebench.core.errors import UserError
from saebench.saes.spec import SiteWidth
from saebench.sources.model_identity import same_model
from saebench.store.schema import LOGITS_PER_SIGN

if TYPE_CHECKING:
    from saebench.activations.cache import ActivationCache

BLOCK_BYTES = 1 << 27


class Unembedding(NamedTuple):
    """The unembedding [D, V] of a model, and the site that it reads directly: a target of the SAE."""

    W_U_DV: Tensor
    site: str


@torch.no_grad()
def logit_rows(
    W_dec_MD: Tensor, W_U_DV: Tensor, n: int = LOGITS_PER_SIGN
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``(rows of logit, columns of feature)``: the ``n`` most promoted and suppressed tokens of each latent.

    Computed in blocks of latents, so memory stays at ``BLOCK_BYTES`` for any M.
    """
    W_U_DV = W_U_DV.to(W_dec_MD.device, torch.float32)
    n_latents, n_tokens = len(W_dec_MD), W_U_DV.shape[1]
    n = min(n, n_tokens)
    block = max(1, BLOCK_BYTES // (4 * n_tokens))
    token, value = np.empty((n_latents, 2, n), np.int64), np.empty((n_latents, 2, n), np.float32)
    kurtosis_M = np.empty(n_latents, dtype=np.float32)
    for start in range(0, n_latents, block):
        logits_BV = W_dec_MD[start : start + block].float() @ W_U_DV
        for side, largest in ((0, True), (1, False)):
            value_BJ, token_BJ = logits_BV.topk(n, dim=1, largest=largest)
            value[start : start + block, side] = value_BJ.cpu().numpy()
            token[start : start + block, side] = token_BJ.cpu().numpy()
        kurtosis_M[start : start + block] = _kurtosis(logits_BV).cpu().numpy()
    rows = {
        "feature": np.repeat(np.arange(n_latents), 2 * n),
        "sign": np.tile(np.repeat([1, -1], n), n_latents),
        "rank": np.tile(np.arange(n), 2 * n_latents),
        "token": token.reshape(-1),
        "value": value.reshape(-1),
    }
    return rows, {"logit_max": value[:, 0, 0], "logit_kurtosis": kurtosis_M}


def _kurtosis(logits_BV: Tensor) -> Tensor:
    """[B]: excess kurtosis; 0 where all are equal. Overwrites its argument."""
    logits_BV -= logits_BV.mean(1, keepdim=True)
    squares_BV = logits_BV.square_()
    variance_B = squares_BV.mean(1)
    fourth_B = squares_BV.square_().mean(1)
    return torch.where(variance_B > 0, fourth_B / variance_B.square().clamp_min(1e-30) - 3, 0)


def find_unembedding(
    model: str, cache: ActivationCache, targets: Sequence[SiteWidth], vocab: list[bytes] | None
) -> tuple[Unembedding | None, str]:
    """``(unembedding, "")``, or ``(None, why there is none)`` in a sentence.

    ``model`` is 'cache' (the model that made the cache), 'none', or a name to load. Only the residual stream,
    and what is added to it, is read by the unembedding directly: of the ``targets`` that an SAE writes, the
    last such one is used. Targets in several models have no logits.

    Raises:
        UserError: a model named explicitly cannot be loaded or is not the one that made the cache.
    """
    if model == "none":
        return None, "it was left out with --model none"
    if vocab is None:
        return None, "the cache has no tokens, so there is nothing to name logits by"
    if len(cache.models) > 1 and len({target.name.partition(":")[0] for target in targets}) > 1:
        return None, "the sites are of several models, each of which has an unembedding of its own"
    made_by = _made_by(cache, targets)
    if model != "cache":
        return _unembedding(model, None, cache, targets, vocab)
    if not made_by.get("name"):
        return None, "the cache does not say which model made it"
    try:
        return _unembedding(made_by["name"], made_by.get("revision"), cache, targets, vocab)
    except (UserError, ImportError, OSError) as error:
        reason = f"the model {made_by['name']} that made the cache cannot be used ({error})"
        print(f"index: no logits, because {reason}", file=sys.stderr)
        return None, reason


def _made_by(cache: ActivationCache, targets: Sequence[SiteWidth]) -> dict[str, Any]:
    return cache.model or cache.model_of(targets[-1].name) or {}


def _unembedding(
    name: str,
    revision: str | None,
    cache: ActivationCache,
    targets: Sequence[SiteWidth],
    vocab: list[bytes],
) -> tuple[Unembedding | None, str]:
    from saebench.sources.models import load_model

    model = load_model(name, revision=revision)
    made_by = _made_by(cache, targets)
    if made_by.get("hash") and not same_model(made_by, model.info.to_json()):
        raise UserError(
            f"the model {name} is not the one that made the cache {cache.path}: its hash is "
            f"{model.hash[:12]}, the cache's {made_by['hash'][:12]}; pass that model, or --model none"
        )
    hooks = {site.name: site.name if cache.model else cache.hook_of(site.name) for site in targets}
    site = next((site for site in reversed(targets) if model.residual_hook(hooks[site.name])), None)
    if site is None:
        names = " or ".join(hooks)
        return None, f"the hook {names} is not in the residual stream, all that the unembedding reads"
    W_U_DV = model.unembedding(before_cap=True)[:, : len(vocab)]
    if W_U_DV.shape != (site.width, len(vocab)):
        raise UserError(
            f"the unembedding of {name} has shape {tuple(W_U_DV.shape)} but the cache {cache.path} needs "
            f"{(site.width, len(vocab))}; pass the model that made the cache, or --model none"
        )
    return Unembedding(W_U_DV, site.name), ""
