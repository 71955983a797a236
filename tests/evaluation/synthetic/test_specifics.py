"""Metrics of tree levels, token difficulty and small features on constructed codes."""

import pytest
import torch

from saebench.core.codes import SparseCodes
from saebench.evaluation.synthetic import ReadoutWorld, TreeWorld, ZipfWorld
from saebench.evaluation.synthetic.specifics import (
    density_rank_correlation,
    difficulty_correlation,
    empty_rate,
    group_recall,
    readout_damage,
    tree_geometry,
)
from saebench.evaluation.synthetic.tree import CHILDREN


def sparse(dense_NM):
    row_S, index_S = dense_NM.nonzero(as_tuple=True)
    counts = torch.bincount(row_S, minlength=len(dense_NM))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return SparseCodes.from_ragged(dense_NM[row_S, index_S], index_S, offsets, d_sae=dense_NM.shape[1])


@pytest.fixture(scope="module", params=[0, 6])
def tree(request):
    return TreeWorld(level=request.param).sample(3000, part="test")


class TestTree:
    def test_permuted_true_features_preserve_conditional_orthogonality(self, tree):
        order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
        found = tree_geometry(2 * tree.features_FD[order], sparse(tree.codes.to_dense()[:, order]), tree)
        assert found.across_levels < 1e-5 and found.within_level_error < 1e-5
        assert found.matched_cosine == pytest.approx(1)

    def test_children_that_absorb_parents_raise_across_levels(self, tree):
        rows_FD = tree.features_FD.clone()
        for parent, children in enumerate(CHILDREN):
            rows_FD[list(children)] += tree.features_FD[parent]
        found = tree_geometry(rows_FD, tree.codes, tree)
        assert found.across_levels == pytest.approx(0.5**0.5, abs=1e-3)
        # The children of one parent, at cosine c, come to (c + 1) / 2; nine of 64 pairs are children.
        c = (tree.features_FD[11] @ tree.features_FD[12]).item()
        assert found.within_level_error == pytest.approx(9 / 64 * ((c + 1) / 2 - c), abs=1e-3)

    def test_orthogonal_siblings_raise_within_level_error(self, tree):
        flat = TreeWorld(level=0)
        found = tree_geometry(flat.features_FD, tree.codes, tree)
        c = (tree.features_FD[11] @ tree.features_FD[12]).item()
        assert found.across_levels < 1e-5
        assert found.within_level_error == pytest.approx(c, abs=2e-3)

    def test_fewer_latents_than_features_raise_value_error(self, tree):
        with pytest.raises(ValueError, match="19 latents cannot be matched one-to-one with 20"):
            tree_geometry(tree.features_FD[:19], sparse(tree.codes.to_dense()[:, :19]), tree)


class TestDifficulty:
    truth = ZipfWorld(n_features=40, d_in=24, true_l0=4).sample(2000, part="test")

    def test_difficulty_correlation_is_1_for_true_l0_and_0_for_constant_l0(self):
        assert difficulty_correlation(self.truth.codes, self.truth) == pytest.approx(1)
        always = torch.zeros(2000, 40)
        always[:, :4] = 1
        assert difficulty_correlation(sparse(always), self.truth) == 0

    def test_density_rank_correlation_follows_matched_features(self):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
        z_NM = self.truth.codes.to_dense()
        rows_MD = self.truth.features_FD[order]
        assert density_rank_correlation(rows_MD, sparse(z_NM[:, order]), self.truth) == pytest.approx(1)
        assert density_rank_correlation(rows_MD, sparse((z_NM == 0)[:, order] * 1.0), self.truth) < -0.99

    def test_empty_rate_is_share_of_rows_without_active_latent(self):
        z_NM = self.truth.codes.to_dense()
        z_NM[:500] = 0
        assert empty_rate(sparse(z_NM)) == 0.25
        assert empty_rate(self.truth.codes) == 0


class TestReadout:
    truth = ReadoutWorld().sample(3000, part="test")

    def test_group_recall_counts_only_features_of_group(self):
        z_NM, order = self.truth.codes.to_dense(), torch.arange(224).flip(0)
        z_NM[:1500, 192:] = 0
        kept = (z_NM[:, 192:] > 0).sum() / (self.truth.codes.to_dense()[:, 192:] > 0).sum()
        codes, rows_MD = sparse(z_NM[:, order]), self.truth.features_FD[order]
        assert group_recall(rows_MD, codes, self.truth, "small") == pytest.approx(kept.item())
        assert group_recall(rows_MD, codes, self.truth, "large") == pytest.approx(1)

    def test_readout_damage_depends_only_on_small_features(self):
        x_ND, readout = self.truth.x_ND, self.truth.readout
        none = readout_damage(x_ND, x_ND, readout)
        assert none.ce_damage == 0 and abs(none.kl) < 1e-6
        z_NM = self.truth.codes.to_dense()
        without_large = readout_damage(z_NM[:, 192:] @ self.truth.features_FD[192:], x_ND, readout)
        assert abs(without_large.ce_damage) < 1e-4 and abs(without_large.kl) < 1e-4
        without_small = readout_damage(z_NM[:, :192] @ self.truth.features_FD[:192], x_ND, readout)
        assert without_small.ce_damage > 1 and without_small.kl == pytest.approx(
            without_small.ce_damage, rel=0.05
        )
