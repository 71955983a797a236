"""``TreeWorld``: which features are active together, frequencies, and cosines of directions."""

import pytest
import torch

from saebench.evaluation.synthetic.tree import (
    CHILDREN,
    N_LEVELS,
    N_ROOT_CHILDREN,
    P_ROOT_CHILDREN,
    TRUE_L0,
    TreeWorld,
)

N = 50_000


@pytest.fixture(scope="module")
def truth():
    return TreeWorld(level=1).sample(N)


@pytest.mark.parametrize("level", range(N_LEVELS))
def test_siblings_have_cosine_of_level_and_other_pairs_are_orthogonal(level):
    world = TreeWorld(level=level)
    cosines_FF = world.features_FD @ world.features_FD.T
    expected_FF = torch.eye(20)
    for indices in world.groups().values():
        expected_FF[indices[:, None], indices] = level / 10
    expected_FF.fill_diagonal_(1)
    torch.testing.assert_close(cosines_FF, expected_FF, rtol=0, atol=1e-3)


def test_one_child_of_root_is_active_and_at_most_one_of_its_children(truth):
    active_NF = truth.codes.to_dense() > 0
    assert (active_NF[:, :N_ROOT_CHILDREN].sum(1) == 1).all()
    for parent, children in enumerate(CHILDREN):
        n_children = active_NF[:, children].sum(1)
        assert n_children.max() == 1
        assert not (n_children > active_NF[:, parent]).any()


def test_frequencies_and_mean_l0_match_exact_values(truth):
    expected = torch.tensor([*P_ROOT_CHILDREN, *([0.2 * 0.2] * 9)], dtype=torch.float64)
    deviation = (expected * (1 - expected) / N).sqrt()
    assert ((truth.frequency() - expected).abs() < 4.5 * deviation).all()
    l0_N = truth.codes.l0().double()
    assert abs(l0_N.mean() - TRUE_L0) < 4.5 * l0_N.std() / N**0.5


def test_strengths_have_stated_mean_and_deviation(truth):
    values = truth.codes.values
    assert abs(values.mean() - 1.5) < 0.005 and abs(values.std() - 0.25) < 0.005


def test_levels_draw_same_strengths():
    assert torch.equal(TreeWorld(level=0).sample(50).codes.values, TreeWorld(level=8).sample(50).codes.values)


@pytest.mark.parametrize("level", [-1, 9])
def test_level_out_of_range_raises_value_error(level):
    with pytest.raises(ValueError, match="must be between 0 and 8"):
        TreeWorld(level=level)
