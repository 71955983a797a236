"""Recovery metrics: how well an SAE recovers the directions and the firing of known features.

Explained variance, L0 and dead latents are in ``saebench.evaluation.reconstruction``. Metrics with the same
name in sae-lens 6.54 (``sae_lens.synthetic``) are the same quantities.

Shapes: N rows, M = d_sae latents, F true features, D = d_in, S entries of sparse codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.core.codes import SparseCodes
from saebench.evaluation.reconstruction import fires
from saebench.evaluation.synthetic.truth import GroundTruth


@dataclass(frozen=True, kw_only=True)
class RecoveryMetrics:
    """Metrics of directions, decoder rows d_j against features g_f, and of firing.

    Firing compares latent j with its feature f(j) = argmax_f |cos(d_j, g_f)|. A latent fires if z_j != 0; a
    feature fires if its activation is above 0.

    - ``mcc_hungarian``: mean of |cos(d_j, g_f)| over the min(M, F) pairs of the best one-to-one matching
      (arXiv 2505.20254, "mean correlation coefficient"; not Matthews' correlation).
    - ``uniqueness``: number of different f(j), divided by M.
    - ``precision``: mean over all latents of the share of the latent's rows in which its feature is active.
    - ``recall``: mean over all latents of the share of the feature's rows in which the latent fires.
    - ``f1``: mean over all latents of 2 precision recall / (precision + recall).

    A ratio whose denominator is zero counts as 0, so a dead latent lowers precision, recall and f1.
    """

    mcc_hungarian: float
    uniqueness: float
    precision: float
    recall: float
    f1: float


def recovery_metrics(W_dec_MD: Tensor, codes: SparseCodes, truth: GroundTruth) -> RecoveryMetrics:
    """Compare decoder rows [M, d_in], and ``codes`` of the rows of ``truth``, with the true features."""
    cosines_MF = absolute_cosines(W_dec_MD, truth.features_FD)
    precision_M, recall_M = precision_and_recall(codes, truth, cosines_MF.argmax(dim=1))
    return RecoveryMetrics(
        mcc_hungarian=mcc_hungarian(cosines_MF),
        uniqueness=uniqueness(cosines_MF),
        precision=precision_M.mean().item(),
        recall=recall_M.mean().item(),
        f1=_ratio(2 * precision_M * recall_M, precision_M + recall_M).mean().item(),
    )


def absolute_cosines(rows_MD: Tensor, features_FD: Tensor) -> Tensor:
    """[M, F] float32: |cos| of every row with every feature; 0 for a row of zeros."""
    unit_MD, unit_FD = (
        torch.nn.functional.normalize(t.detach().float().cpu()) for t in (rows_MD, features_FD)
    )
    return (unit_MD @ unit_FD.T).abs()


def mcc_hungarian(cosines_MF: Tensor) -> float:
    """Mean |cos| over the best one-to-one matching of min(M, F) pairs."""
    latent_P, feature_P = match(cosines_MF)
    return cosines_MF[latent_P, feature_P].double().mean().item()


def uniqueness(cosines_MF: Tensor) -> float:
    """Number of features that are the nearest feature of a latent, divided by the number of latents."""
    return len(torch.unique(cosines_MF.argmax(dim=1))) / len(cosines_MF)


def match(similarity_MF: Tensor) -> tuple[Tensor, Tensor]:
    """The one-to-one pairs of largest total similarity: latents and features, int64 [min(M, F)] each.

    Pairs are in the order of the latents.
    """
    from scipy.optimize import linear_sum_assignment

    latents, features = linear_sum_assignment(similarity_MF.numpy(), maximize=True)
    return torch.from_numpy(latents).long(), torch.from_numpy(features).long()


def precision_and_recall(codes: SparseCodes, truth: GroundTruth, feature_M: Tensor) -> tuple[Tensor, Tensor]:
    """[M] float64 each: latent j as a detector of feature ``feature_M[j]``; 0 if the denominator is 0.

    precision = TP / (TP + FP), with the latent's rows as denominator; recall = TP / (TP + FN).
    """
    both_M = coincidences(codes, truth, feature_M).double()
    fires_M = fires(codes).double()
    wanted_M = fires(truth.codes)[feature_M].double()
    return _ratio(both_M, fires_M), _ratio(both_M, wanted_M)


def coincidences(codes: SparseCodes, truth: GroundTruth, feature_M: Tensor) -> Tensor:
    """[M] int64: number of rows in which latent j and feature ``feature_M[j]`` (-1: none) both fire."""
    row_S, latent_S = distinct_pairs(codes)
    feature_S = feature_M[latent_S]
    truly_row, truly_feature = distinct_pairs(truth.codes)
    active = truly_row * truth.n_features + truly_feature
    wanted = row_S * truth.n_features + feature_S
    at_S = torch.searchsorted(active, wanted).clamp_max(max(len(active) - 1, 0))
    hit_S = (active[at_S] == wanted) & (feature_S >= 0) if len(active) else torch.zeros_like(wanted).bool()
    return torch.bincount(latent_S[hit_S], minlength=len(feature_M))


def distinct_pairs(codes: SparseCodes) -> tuple[Tensor, Tensor]:
    """Rows and latents, int64, of the active entries, sorted, without duplicates."""
    row_S, index_S, _ = codes.coo()
    keys: Tensor = torch.unique(row_S.cpu() * codes.d_sae + index_S.long().cpu())
    return keys // codes.d_sae, keys % codes.d_sae


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0.0)
