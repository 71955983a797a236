"""Transcoders with random weights, and a plain float64 computation of what other libraries compute."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from saebench.saes.base import Batch
from saebench.saes.registry import architecture
from saebench.saes.spec import SiteWidth

BY_THRESHOLD = ("mutual-choice", "feature-choice", "matryoshka", "jumprelu", "relu", "gated")


def rows(n, d_in, seed=1):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed)) + 0.7


def random_transcoder(name, *, d_in, d_out, skip, d_sae=40, k=5, layer=0, seed=0, hooks=None):
    """A transcoder with calibrated thresholds and b_in other than 0; random biases and skip connection."""
    read, written = hooks or ("mlp.hook_in", "hook_mlp_out")
    sites = (SiteWidth(f"blocks.{layer}.{read}", d_in),)
    targets = (SiteWidth(f"blocks.{layer}.{written}", d_out),)
    spec = architecture(name).Spec(d_sae=d_sae, k=k, sites=sites, targets=targets, skip=skip)
    sae = architecture(name)(spec, d_in)
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    x_ND = rows(2000, d_in, seed + 5)
    target_NE = (x_ND @ noise(d_in, d_out)).relu() + 3
    sae.initialize(Batch(x_ND, noise(2000, d_out), target_NE=target_NE), seed=seed)
    with torch.no_grad():
        for weight, parameter in sae.named_parameters():
            if weight in ("b_enc", "b_gate", "b_mag", "r_mag", "W_skip"):
                parameter.add_(0.1 * noise(*parameter.shape))
        sae.calibrate(rows(2000, d_in, seed + 7))
    assert sae.b_in.abs().min() > 0
    return sae.eval()


def by_file(file, x_ND, *, threshold, transposed):
    """[N, M] codes and [N, E] output of the tensors in ``file``, float64. ``threshold`` names the tensor."""
    weights = {name: tensor.double() for name, tensor in load_file(file).items()}
    W_enc_DM = weights["W_enc"].T if transposed else weights["W_enc"]
    pre_NM = x_ND.double() @ W_enc_DM + weights["b_enc"]
    codes_NM = pre_NM * (pre_NM > weights.get(threshold, torch.zeros(())))
    y_NE = codes_NM @ weights["W_dec"] + weights["b_dec"]
    if "W_skip" in weights:
        y_NE = y_NE + x_ND.double() @ weights["W_skip"].T
    return codes_NM, y_NE


def assert_same(sae, codes_NM, y_NE, x_ND, *, at_least=0.99):
    """``sae`` has these codes and this output, but for rows with a pre-activation next to a threshold."""
    with torch.no_grad():
        ours_NM, ours_NE = sae.encode(x_ND).to_dense(), sae(x_ND)
    agree_N = ((ours_NM != 0) == (codes_NM != 0)).all(1)
    assert agree_N.float().mean() >= at_least and (codes_NM != 0).sum() > 0
    for a_NX, b_NX in ((ours_NM, codes_NM), (ours_NE, y_NE)):
        torch.testing.assert_close(a_NX[agree_N].double(), b_NX[agree_N].double(), rtol=1e-4, atol=1e-4)
