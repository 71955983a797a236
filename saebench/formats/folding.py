"""Rewriting an SAE's weights so that it computes the same from plainer parts.

Other libraries keep scales beside the weights: norms of decoder rows, a factor on the input, a bias that is
not subtracted from it. Each function here takes one of them into the weights, exactly (in float64).

Weights are a dictionary in the names of ``SAE``: ``W_enc_MD`` and ``W_dec`` [d_sae, d_in], ``b_dec``
[d_in], and, where the architecture has them, ``b_enc``, ``threshold``, ``b_gate``, ``b_mag``, ``r_mag``
[d_sae].

Shapes: M = d_sae latents, D = d_in.
"""

from __future__ import annotations

import torch
from torch import Tensor

Weights = dict[str, Tensor]

IN_UNITS_OF_PRE_ACTIVATIONS = ("b_enc", "threshold", "b_gate", "b_mag")
ROUNDING = 1e-6
SMALLEST_NORM = 1e-8
"""A decoder row of norm 0 belongs to a latent that does nothing; SAELens divides by this as well."""


def decoder_norms(weights: Weights) -> Tensor:
    """[M] float64, never 0."""
    norm_M: Tensor = torch.linalg.vector_norm(weights["W_dec"].double(), dim=1)
    return norm_M.clamp_min(SMALLEST_NORM)


def fold_decoder_norms(weights: Weights) -> Weights:
    """Give decoder rows unit norm and latents the factor: z'_i = |d_i| z_i, the same reconstruction.

    Exact where each latent's activation depends on its own pre-activation alone (relu, jumprelu, gated); for
    a choice among latents, where the choice was by |d_i| z_i, or all norms are equal.
    """
    norm_M = decoder_norms(weights)
    folded = dict(weights, W_dec=weights["W_dec"].double() / norm_M[:, None])
    folded["W_enc_MD"] = weights["W_enc_MD"].double() * norm_M[:, None]
    for name in IN_UNITS_OF_PRE_ACTIVATIONS:
        if name in weights:
            folded[name] = weights[name].double() * norm_M
    return folded


def fold_input_bias(weights: Weights) -> Weights:
    """From pre-activations of x to pre-activations of x - b_dec: W x + b = W (x - b_dec) + (b + W b_dec)."""
    shift_M = weights["W_enc_MD"].double() @ weights["b_dec"].double()
    folded = dict(weights)
    for name in ("b_enc", "b_gate"):
        if name in weights:
            folded[name] = weights[name].double() + shift_M
    if "b_mag" in weights:
        folded["b_mag"] = weights["b_mag"].double() + weights["r_mag"].double().exp() * shift_M
    return folded


def fold_input_scale(weights: Weights, scale: float) -> Weights:
    """From an SAE of ``scale * x`` to one of ``x`` whose codes are ``scale`` times smaller.

    As ``SAE.fold_scale``: z(s x) = s z'(x) for activation functions homogeneous of degree one, with all that
    is in the units of pre-activations divided by s. W_enc and W_dec stay, so decoder rows keep their norms.
    """
    in_units_of_x = (*IN_UNITS_OF_PRE_ACTIVATIONS, "b_dec")
    return {n: t.double() / scale if n in in_units_of_x else t for n, t in weights.items()}


def norms_are_equal(weights: Weights) -> bool:
    """Whether all decoder rows have one norm, up to float32 rounding."""
    norm_M = decoder_norms(weights)
    return bool((norm_M / norm_M.mean() - 1).abs().max() <= ROUNDING)


def norms_are_one(weights: Weights) -> bool:
    """Whether all decoder rows have norm 1, up to float32 rounding."""
    return bool((decoder_norms(weights) - 1).abs().max() <= ROUNDING)


def in_float32(weights: Weights) -> Weights:
    """Contiguous float32 tensors, as SAEs are kept."""
    return {name: tensor.to(torch.float32).contiguous() for name, tensor in weights.items()}
