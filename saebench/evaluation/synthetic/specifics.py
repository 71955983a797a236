"""Metrics for one kind of synthetic data: levels of a tree, difficulty of tokens, small features.

Shapes: N rows, M = d_sae latents, F true features, D = d_in, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saebench.core.codes import SparseCodes
from saebench.evaluation.reconstruction import fires
from saebench.evaluation.synthetic.recovery import absolute_cosines, coincidences, match
from saebench.evaluation.synthetic.tree import CHILDREN
from saebench.evaluation.synthetic.truth import GroundTruth, Readout


@dataclass(frozen=True, kw_only=True)
class TreeGeometry:
    """Geometry of the decoder rows of the latents that match a tree's features (``match_by_activations``).

    - ``across_levels``: mean |cos| between the rows of a parent and of its child, over the nine such pairs.
      The true value is 0. Feature absorption and feature splitting raise it.
    - ``within_level_error``: mean |cos(d_i, d_j) - cos(g_i, g_j)| over all pairs of siblings (55 pairs of
      children of the root and three pairs of each triple). It is 0 if cosines of siblings are exact.
    - ``matched_cosine``: mean |cos(d_i, g_i)| over the features.

    Conditional orthogonality is preserved if the first two are both small.
    """

    across_levels: float
    within_level_error: float
    matched_cosine: float


def tree_geometry(W_dec_MD: Tensor, codes: SparseCodes, truth: GroundTruth) -> TreeGeometry:
    """Geometry of an SAE on the tree of ``TreeWorld``.

    Decoder rows are [M, d_in]; ``codes`` are the codes of the rows of ``truth``.

    Raises:
        ValueError: the SAE has fewer latents than the tree has features.
    """
    if codes.d_sae < truth.n_features:
        raise ValueError(
            f"{codes.d_sae} latents cannot be matched one-to-one with {truth.n_features} features"
        )
    latent_P, feature_P = match_by_activations(codes, truth)
    rows_FD = torch.empty_like(truth.features_FD)
    rows_FD[feature_P] = torch.nn.functional.normalize(W_dec_MD.detach().float().cpu()[latent_P])
    features_FD = truth.features_FD
    found_FF, true_FF = rows_FD @ rows_FD.T, features_FD @ features_FD.T
    child_P = torch.tensor(CHILDREN).flatten()
    parent_P = torch.arange(len(CHILDREN)).repeat_interleave(len(CHILDREN[0]))
    pairs_2P = torch.cat([torch.combinations(indices) for indices in truth.groups.values()]).T
    return TreeGeometry(
        across_levels=found_FF[parent_P, child_P].abs().mean().item(),
        within_level_error=(found_FF - true_FF)[pairs_2P[0], pairs_2P[1]].abs().mean().item(),
        matched_cosine=(rows_FD * features_FD).sum(1).abs().mean().item(),
    )


def match_by_activations(codes: SparseCodes, truth: GroundTruth) -> tuple[Tensor, Tensor]:
    """One-to-one pairs of latents and features with similar activations, int64 [min(M, F)] each.

    The similarity is |sum_n z_nj g_nf| / (|z_j| |g_f|) over the rows; it is 0 for a latent or feature that
    never fires. The matching maximizes the total similarity. Directions are not used, because siblings have
    similar directions.
    """
    z_NM, g_NF = codes.to_dense().float().cpu(), truth.codes.to_dense()
    z_NM, g_NF = (torch.nn.functional.normalize(t, dim=0) for t in (z_NM, g_NF))
    return match((z_NM.T @ g_NF).abs())


def difficulty_correlation(codes: SparseCodes, truth: GroundTruth) -> float:
    """Pearson correlation over rows of the number of active latents with that of active features.

    It is 0 if one of the numbers is the same in every row, as for a TopK SAE.
    """
    return _pearson(codes.l0().double().cpu(), truth.codes.l0().double())


def density_rank_correlation(W_dec_MD: Tensor, codes: SparseCodes, truth: GroundTruth) -> float:
    """Spearman correlation of the density of a latent with the frequency of its feature.

    Pairs come from the best one-to-one matching of directions; ties share their mean rank.
    """
    from scipy.stats import rankdata

    latent_P, feature_P = match(absolute_cosines(W_dec_MD, truth.features_FD))
    density_P = fires(codes).cpu()[latent_P]
    ranks = [torch.from_numpy(rankdata(t.numpy())) for t in (density_P, truth.frequency()[feature_P])]
    return _pearson(ranks[0], ranks[1])


def empty_rate(codes: SparseCodes) -> float:
    """The share of rows without an active latent."""
    return (codes.l0() == 0).double().mean().item()


def group_recall(W_dec_MD: Tensor, codes: SparseCodes, truth: GroundTruth, group: str) -> float:
    """Share of the activations of the features of ``group`` in which the feature's latent also fires.

    A feature's latent is its match in the best one-to-one matching of directions.
    """
    latent_P, feature_P = match(absolute_cosines(W_dec_MD, truth.features_FD))
    in_group_P = torch.isin(feature_P, truth.groups[group])
    feature_M = torch.full((codes.d_sae,), -1)
    feature_M[latent_P[in_group_P]] = feature_P[in_group_P]
    found = coincidences(codes, truth, feature_M).sum().item()
    return found / max(fires(truth.codes)[truth.groups[group]].sum().item(), 1)


@dataclass(frozen=True, kw_only=True)
class ReadoutDamage:
    """Loss of a downstream classifier that reads reconstructions instead of rows, in nats per row.

    - ``ce_damage``: mean CE(x_hat) - CE(x) of the labels.
    - ``kl``: mean KL(softmax(x W) || softmax(x_hat W)), the damage expected over newly drawn labels. It does
      not favor codes that were selected with knowledge of the labels.
    """

    ce_damage: float
    kl: float


def readout_damage(x_hat_ND: Tensor, x_ND: Tensor, readout: Readout) -> ReadoutDamage:
    """Compare the classifier on reconstructions with the classifier on the rows, both [N, d_in]."""
    clean_NC, spliced_NC = ((t @ readout.W_DC).log_softmax(dim=1) for t in (x_ND, x_hat_ND))
    damage_N = readout.cross_entropy(x_hat_ND) - readout.cross_entropy(x_ND)
    kl_N = (clean_NC.exp() * (clean_NC - spliced_NC)).sum(1)
    return ReadoutDamage(ce_damage=damage_N.double().mean().item(), kl=kl_N.double().mean().item())


def _pearson(a_P: Tensor, b_P: Tensor) -> float:
    a_P, b_P = a_P - a_P.mean(), b_P - b_P.mean()
    scale = (a_P.norm() * b_P.norm()).item()
    return (a_P @ b_P).item() / scale if scale > 0 else 0.0
