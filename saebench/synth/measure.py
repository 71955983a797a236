"""``measure``: all metrics of one trained SAE on test rows with known features.

Shapes: N rows, D = d_in.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from saebench.core.codes import SparseCodes
from saebench.evaluation.reconstruction import ReconstructionMeter
from saebench.evaluation.synthetic import GroundTruth, recovery_metrics
from saebench.evaluation.synthetic.recovery import distinct_pairs
from saebench.evaluation.synthetic.specifics import (
    density_rank_correlation,
    difficulty_correlation,
    empty_rate,
    group_recall,
    readout_damage,
    tree_geometry,
)
from saebench.evaluation.synthetic.truth import join_codes
from saebench.saes.base import SAE
from saebench.synth.settings import SyntheticData

ROWS_AT_ONCE = 4096
COMMON = ("explained_variance", "mcc_hungarian", "uniqueness", "precision", "recall", "f1", "l0", "dead")
SPECIFIC: dict[SyntheticData, tuple[str, ...]] = {
    "tree": ("across_levels", "within_level_error", "matched_cosine"),
    "zipf": ("difficulty_correlation", "density_rank_correlation", "empty_rate"),
    "readout": ("small_recall", "ce_damage", "kl", "changed_picks"),
    "superposition": ("density_rank_correlation",),
}


@torch.no_grad()
def measure(
    sae: SAE, truth: GroundTruth, kind: SyntheticData, *, inference: str = "plain"
) -> dict[str, float]:
    """Metric -> value for the metrics in ``COMMON`` and ``SPECIFIC[kind]``, on the rows of ``truth``.

    ``dead`` counts latents that fire on none of these rows. ``changed_picks`` is the share of active entries
    that are not active in the inference mode 'plain' of the same SAE.
    """
    codes = read(sae, truth, inference)
    meter = ReconstructionMeter(sae)
    x_hat_ND = meter.update(truth.x_ND, codes.to(sae.W_dec.device)).cpu()
    reconstruction, W_dec_MD = meter.result(), sae.W_dec.cpu()
    found: dict[str, float] = {
        "explained_variance": reconstruction.explained_variance,
        "l0": reconstruction.l0,
        "dead": round(reconstruction.dead_fraction * sae.d_sae),
        **dataclasses.asdict(recovery_metrics(W_dec_MD, codes, truth)),
    }
    if kind == "tree":
        found |= dataclasses.asdict(tree_geometry(W_dec_MD, codes, truth))
    if kind == "zipf":
        found["difficulty_correlation"] = difficulty_correlation(codes, truth)
        found["empty_rate"] = empty_rate(codes)
    if kind in ("zipf", "superposition"):
        found["density_rank_correlation"] = density_rank_correlation(W_dec_MD, codes, truth)
    if kind == "readout":
        assert truth.readout is not None
        found |= dataclasses.asdict(readout_damage(x_hat_ND, truth.x_ND, truth.readout))
        found["small_recall"] = group_recall(W_dec_MD, codes, truth, "small")
        plain = codes if inference == "plain" else read(sae, truth, "plain")
        found["changed_picks"] = share_outside(codes, plain)
    return {name: found[name] for name in (*COMMON, *SPECIFIC[kind])}


def read(sae: SAE, truth: GroundTruth, inference: str) -> SparseCodes:
    """Codes of the rows of ``truth``, on the CPU; only gradient SAEs have modes other than 'plain'."""
    gradient_ND = truth.gradient_ND if inference == "oracle" else None
    pieces = []
    for start in range(0, truth.n_rows, ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        how: dict[str, str | Tensor] = {"inference": inference} if sae.uses_gradients else {}
        if gradient_ND is not None:
            how["gradient"] = gradient_ND[rows].to(sae.W_dec.device)
        pieces.append(sae.encode(truth.x_ND[rows].to(sae.W_dec.device), **how).to("cpu"))
    return join_codes(pieces)


def share_outside(codes: SparseCodes, others: SparseCodes) -> float:
    """The share of the active entries of ``codes`` that are not active in ``others``, of the same rows."""
    (row_S, latent_S), (other_row_S, other_latent_S) = distinct_pairs(codes), distinct_pairs(others)
    keys, other_keys = row_S * codes.d_sae + latent_S, other_row_S * codes.d_sae + other_latent_S
    return 1 - torch.isin(keys, other_keys).double().mean().item()
