"""Folders in the format of SAELens, and a dense float64 reference of what SAELens computes from them.

tests/peers compares the reference with SAELens itself.
"""

import json

import torch
from safetensors.torch import save_file

from saebench.saes.base import Batch
from saebench.saes.registry import architecture

D_IN, D_SAE, K = 12, 40, 5


def write_folder(folder, architecture, *, seed=0, version="6.54.12", metadata=None, **settings):
    """Write a folder with random weights and decoder norms other than 1; return the weights in float64."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    W_dec = random(D_SAE, D_IN) * (0.5 + torch.rand(D_SAE, 1, generator=generator)) / D_IN**0.5
    tensors = {
        "W_enc": W_dec.T.contiguous() + 0.1 * random(D_IN, D_SAE),
        "b_enc": 0.1 * random(D_SAE),
        "W_dec": W_dec,
        "b_dec": 0.3 * random(D_IN),
        "threshold": 0.5 + 0.4 * random(D_SAE),
        "topk_threshold": torch.tensor(0.8, dtype=torch.float64),
        "b_gate": 0.1 * random(D_SAE) - 0.3,
        "b_mag": 0.1 * random(D_SAE),
        "r_mag": 0.2 * random(D_SAE),
    }
    names = {
        "jumprelu": ["W_enc", "b_enc", "threshold"],
        "batchtopk": ["W_enc", "b_enc", "topk_threshold"],
        "gated": ["W_enc", "b_gate", "b_mag", "r_mag"],
        "matching_pursuit": [],
    }.get(architecture, ["W_enc", "b_enc"])
    tensors["threshold"][:3] = torch.tensor([0.0, -0.2, -1.0])
    kept = {name: tensors[name] for name in [*names, "W_dec", "b_dec"]}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(kept, folder / "sae_weights.safetensors")
    config = {
        "architecture": architecture,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "metadata": {"sae_lens_version": version, "hook_name": "blocks.0.hook_resid_post"} | (metadata or {}),
        **settings,
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    return {name: tensor.double() for name, tensor in kept.items()}


def dense_codes(weights, x_ND, *, architecture, subtract=True, by_norm=False, k=K):
    """[N, M] codes and [N, D] reconstruction as SAELens computes them, without normalizing W_dec."""
    x_ND, W_dec = x_ND.double(), weights["W_dec"]
    norm_M = W_dec.norm(dim=1)
    centered_ND = x_ND - weights["b_dec"] if subtract else x_ND
    pre_NM = centered_ND @ weights["W_enc"]
    if architecture == "gated":
        magnitude_NM = (pre_NM * weights["r_mag"].exp() + weights["b_mag"]).relu()
        codes_NM = (pre_NM + weights["b_gate"] > 0) * magnitude_NM
    else:
        pre_NM = (pre_NM + weights["b_enc"]) * (norm_M if by_norm else 1)
        codes_NM = pre_NM.relu()
        if architecture == "topk":
            top = codes_NM.topk(k, dim=1)
            codes_NM = torch.zeros_like(codes_NM).scatter(1, top.indices, top.values)
        threshold = weights.get("threshold", weights.get("topk_threshold"))
        if threshold is not None:
            codes_NM = codes_NM * (pre_NM > threshold)
    decoder_MD = W_dec / norm_M[:, None] if by_norm else W_dec
    return codes_NM, codes_NM @ decoder_MD + weights["b_dec"]


def dense_pursuit(weights, x_ND, *, k, tolerance=0.0, stop_on_repeat=False):
    """[N, D] reconstruction by matching pursuit, without normalizing the atoms."""
    atoms_MD, residual_ND = weights["W_dec"], x_ND.double() - weights["b_dec"]
    start_ND = residual_ND.clone()
    done_N = torch.zeros(len(x_ND), dtype=torch.bool)
    picked_NM = torch.zeros(len(x_ND), len(atoms_MD), dtype=torch.bool)
    for _ in range(k):
        value_N, index_N = (residual_ND @ atoms_MD.T).relu().max(dim=1)
        value_N = torch.where(done_N, 0, value_N)
        residual_ND = residual_ND - value_N[:, None] * atoms_MD[index_N]
        done_N |= residual_ND.norm(dim=1) < tolerance
        if stop_on_repeat:
            done_N |= picked_NM.gather(1, index_N[:, None])[:, 0]
            picked_NM.scatter_(1, index_N[:, None], True)
    return start_ND - residual_ND + weights["b_dec"]


def rows(n=300, seed=1, d_in=D_IN):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


def random_sae(name, *, d_in=D_IN, d_sae=D_SAE, k=K):
    """An initialized SAE of saebench with random biases and calibrated thresholds."""
    sae_class = architecture(name)
    sae = sae_class(sae_class.Spec(d_sae=d_sae, k=k), d_in)
    sae.initialize(Batch(rows(2000, 5, d_in), rows(2000, 6, d_in)), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight, parameter in sae.named_parameters():
            if weight in ("b_enc", "b_gate", "b_mag", "r_mag"):
                parameter.add_(0.05 * torch.randn(d_sae, generator=generator))
        sae.calibrate(rows(2000, 7, d_in))
    return sae.eval()
