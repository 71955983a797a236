"""``SuperpositionWorld``: rules of the trees, frequencies, and correlation of the base features."""

import pytest
import torch

from saebench.evaluation.synthetic.superposition import SuperpositionWorld

N = 30_000


@pytest.fixture(scope="module")
def world():
    return SuperpositionWorld()


@pytest.fixture(scope="module")
def active_NF(world):
    return world.sample(N).codes.to_dense() > 0


def test_shapes_and_group_sizes(world):
    assert world.features_FD.shape == (1024, 128)
    assert len(world.sibling_families) == 8 * (1 + 4 + 16)
    sizes = {name: len(indices) for name, indices in world.groups().items()}
    assert sizes == {"base": 8 + 1024 - 8 * 85, "level 1": 32, "level 2": 128, "level 3": 512}


def test_children_need_active_parent_and_siblings_exclude_each_other(world, active_NF):
    child_F = (world.parents >= 0).nonzero()[:, 0]
    assert not (active_NF[:, child_F] & ~active_NF[:, world.parents[child_F]]).any()
    for family in world.sibling_families:
        assert len(set(world.parents[family].tolist())) == 1
        assert active_NF[:, family].sum(1).max() <= 1


def test_frequencies_match_exact_probabilities(world, active_NF):
    expected_F = world.frequencies()
    deviation_F = (expected_F * (1 - expected_F) / N).sqrt()
    seen_F = active_NF.double().mean(0)
    assert ((seen_F - expected_F).abs() < 5 * deviation_F + 1 / N).all()
    base_B = world.groups()["base"]
    zipf_B = 0.3 * torch.arange(1, len(base_B) + 1, dtype=torch.float64) ** -0.6
    torch.testing.assert_close(expected_F[base_B], zipf_B)
    family = world.sibling_families[0]
    assert (expected_F[family].sum() / expected_F[world.parents[family[0]]]).item() == pytest.approx(0.8)


def test_base_features_are_correlated_by_their_loadings(world, active_NF):
    base_B = world.groups()["base"][:30]
    loadings_BR = world.loadings()[:30].double()
    planned_BB = loadings_BR @ loadings_BR.T
    seen_BB = torch.corrcoef(active_NF[:, base_B].double().T)
    i, j = torch.triu_indices(30, 30, offset=1)
    # A thresholded pair is correlated less than the normal variables are, in the same direction.
    assert torch.corrcoef(torch.stack([planned_BB[i, j], seen_BB[i, j]]))[0, 1] > 0.9
    strong = planned_BB[i, j].abs() > 0.1
    assert (planned_BB[i, j][strong].sign() == seen_BB[i, j][strong].sign()).all()


def test_more_frequent_features_have_larger_mean_strength(world):
    means_F, frequencies_F = world.mean_strengths(), world.frequencies()
    assert means_F[frequencies_F.argmax()] == 1.25 and means_F[frequencies_F.argmin()] == 1
    order = frequencies_F.argsort(descending=True, stable=True)
    assert (means_F[order].diff() < 0).all()


def test_fewer_features_than_tree_nodes_raise_value_error():
    with pytest.raises(ValueError, match="nodes of 8 trees"):
        SuperpositionWorld(n_features=600)
