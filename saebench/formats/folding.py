"""Functions that fold scales and biases into an SAE's weights without changing what the SAE computes.

Other libraries store scales outside the weights: norms of decoder rows, a factor on the input, a bias that
is not subtracted from the input. Each function here folds one of them into the weights, in float64.

Weights are a dictionary in the names of ``SAE``: ``W_enc_MD`` [d_sae, d_in], ``W_dec`` [d_sae, d_out],
``b_dec`` [d_out], and, where the architecture has them, ``b_enc``, ``threshold``, ``b_gate``, ``b_mag``,
``r_mag`` [d_sae], ``b_in`` [d_in] and ``W_skip`` [d_out, d_in].

Shapes: M = d_sae latents, D = d_in, E = d_out.
"""

from __future__ import annotations

import torch
from torch import Tensor

Weights = dict[str, Tensor]

IN_UNITS_OF_PRE_ACTIVATIONS = ("b_enc", "threshold", "b_gate", "b_mag")
ROUNDING = 1e-6
SMALLEST_NORM = 1e-8
"""Lower bound of norms, so that rows of zeros can be divided; the same bound as in SAELens."""


def decoder_norms(weights: Weights) -> Tensor:
    """[M] float64: the norm of each decoder row, at least ``SMALLEST_NORM``."""
    norm_M: Tensor = torch.linalg.vector_norm(weights["W_dec"].double(), dim=1)
    return norm_M.clamp_min(SMALLEST_NORM)


def fold_decoder_norms(weights: Weights) -> Weights:
    """Scale decoder rows to unit norm and codes to z'_i = |d_i| z_i; the reconstruction stays the same.

    This is exact if each latent's activation depends only on its own pre-activation (relu, jumprelu, gated).
    For SAEs that select among latents, it is exact if they select by |d_i| z_i or if all norms are equal.
    """
    norm_M = decoder_norms(weights)
    folded = dict(weights, W_dec=weights["W_dec"].double() / norm_M[:, None])
    folded["W_enc_MD"] = weights["W_enc_MD"].double() * norm_M[:, None]
    for name in IN_UNITS_OF_PRE_ACTIVATIONS:
        if name in weights:
            folded[name] = weights[name].double() * norm_M
    return folded


def fold_input_bias(weights: Weights) -> Weights:
    """Make an encoder of x one of x - b_dec: W x + b = W (x - b_dec) + (b + W b_dec)."""
    return _shift_encoder(weights, -weights["b_dec"].double())


def fold_b_in(weights: Weights) -> Weights:
    """Make a transcoder of x - b_in one of x, without b_in: b_enc - W b_in and, of a skip connection,
    b_dec - W_skip b_in."""
    b_in_D = weights["b_in"].double()
    folded = _shift_encoder({name: w for name, w in weights.items() if name != "b_in"}, b_in_D)
    if "W_skip" in weights:
        folded["b_dec"] = weights["b_dec"].double() - weights["W_skip"].double() @ b_in_D
    return folded


def _shift_encoder(weights: Weights, offset_D: Tensor) -> Weights:
    """Make an encoder of x one of x + offset: W x + b = W (x + offset) + (b - W offset)."""
    shift_M = weights["W_enc_MD"].double() @ offset_D
    folded = dict(weights)
    for name in ("b_enc", "b_gate"):
        if name in weights:
            folded[name] = weights[name].double() - shift_M
    if "b_mag" in weights:
        folded["b_mag"] = weights["b_mag"].double() - weights["r_mag"].double().exp() * shift_M
    return folded


def as_jumprelu(weights: Weights) -> Weights:
    """The weights of a gated SAE as those of the JumpReLU SAE that computes the same.

    With r = exp(r_mag), the magnitude m = r W x + b_mag is the pre-activation, and the gate is open where
    W x + b_gate > 0, that is, where m > b_mag - r b_gate (Rajamanoharan et al. 2024, arXiv 2404.16014). A
    threshold below 0 is 0, because only positive magnitudes are active.
    """
    rate_M = weights["r_mag"].double().exp()
    threshold_M = weights["b_mag"].double() - rate_M * weights["b_gate"].double()
    kept = {name: w for name, w in weights.items() if name not in ("b_gate", "b_mag", "r_mag")}
    return {
        **kept,
        "W_enc_MD": weights["W_enc_MD"].double() * rate_M[:, None],
        "b_enc": weights["b_mag"],
        "threshold": threshold_M.clamp_min(0),
    }


def fold_input_scale(weights: Weights, scale: float) -> Weights:
    """Make an SAE of ``scale * x`` one of ``x``; its codes are ``scale`` times smaller.

    As in ``SAE.fold_scale``: z(s x) = s z'(x) for activation functions that are homogeneous of degree one,
    if everything in the units of pre-activations is divided by s. W_enc and W_dec do not change, so decoder
    rows keep their norms.
    """
    in_units_of_x = (*IN_UNITS_OF_PRE_ACTIVATIONS, "b_dec")
    return {n: t.double() / scale if n in in_units_of_x else t for n, t in weights.items()}


def norms_are_equal(weights: Weights) -> bool:
    """Whether all decoder rows have the same norm, up to float32 rounding."""
    norm_M = decoder_norms(weights)
    return bool((norm_M / norm_M.mean() - 1).abs().max() <= ROUNDING)


def norms_are_one(weights: Weights) -> bool:
    """Whether all decoder rows have norm 1, up to float32 rounding."""
    return bool((decoder_norms(weights) - 1).abs().max() <= ROUNDING)


def in_float32(weights: Weights) -> Weights:
    """Contiguous float32 tensors, as SAEs are stored."""
    return {name: tensor.to(torch.float32).contiguous() for name, tensor in weights.items()}
