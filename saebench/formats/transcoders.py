"""Transcoders as other libraries hold them: one site, one target, a threshold per latent, no b_in."""

from __future__ import annotations

import re
from typing import Any

import torch

from saebench.core.errors import UserError
from saebench.formats import folding
from saebench.formats.folding import Weights
from saebench.saes.base import SAE
from saebench.saes.spec import SaeSpec

_BY_THRESHOLD = ("mutual-choice", "feature-choice", "matryoshka", "jumprelu", "relu", "gated")
"""Architectures whose latents are active at inference where a pre-activation is above a threshold."""
_OF_A_MODEL = re.compile(r"\d+:")


def check_transcoder(spec: SaeSpec, *, library: str) -> None:
    """Raise a UserError unless other libraries can hold the transcoder of ``spec``.

    ``library`` is the format's name in the sentence.
    """
    sites, targets = (", ".join(site.name for site in one) for one in (spec.sites, spec.targets))
    if spec.is_crosscoder:
        raise UserError(
            f"{library} has no format for crosscoders, and this one joins {sites}; export SAEs of one site"
        )
    if len(spec.sites) != 1 or len(spec.targets) != 1 or _OF_A_MODEL.match(sites + targets):
        raise UserError(
            f"{library} holds transcoders of one site and one target of one model, and this one reads "
            f"{sites} and writes {targets}; train one for each pair of sites"
        )
    if spec.name not in _BY_THRESHOLD:
        raise UserError(
            f"{library} holds transcoders with a threshold per latent, which {spec.name} does not have; it "
            f"can hold {', '.join(_BY_THRESHOLD)}"
        )


@torch.no_grad()
def without_b_in(sae: SAE) -> Weights:
    """The weights of a transcoder of z = relu(pre) where pre > threshold, pre = W_enc x + b_enc.

    ``W_enc_MD`` [d_sae, d_in], ``W_dec`` [d_sae, d_out], ``b_enc`` [d_sae], ``b_dec`` [d_out], and, where the
    transcoder has them, ``threshold`` [d_sae], at least 0, and ``W_skip`` [d_out, d_in]; float32, on the CPU.
    """
    assert sae.spec.name in _BY_THRESHOLD
    weights = folding.fold_b_in({name: getattr(sae, name).detach().cpu() for name in sae.weight_names})
    if sae.spec.name == "gated":
        weights = folding.as_jumprelu(weights)
    if "threshold" in weights:
        weights["threshold"] = weights["threshold"].expand(sae.d_sae).clamp_min(0)
    return folding.in_float32(weights)


def sites_of(site: str, d_in: int, target: str, d_out: int, *, skip: bool) -> dict[str, Any]:
    """The settings of a transcoder of one site and one target, as `Foreign.spec` has them."""
    return {
        "sites": [{"name": site, "width": d_in}],
        "targets": [{"name": target, "width": d_out}],
        "skip": skip,
    }
