"""``ReadoutWorld``: exact gradients that depend only on small features, and labels from the softmax."""

import pytest
import torch

from saebench.evaluation.synthetic.readout import ReadoutWorld

N = 30_000


@pytest.fixture(scope="module")
def world():
    return ReadoutWorld()


@pytest.fixture(scope="module")
def truth(world):
    return world.sample(N)


def test_gradient_equals_autograd_of_cross_entropy(truth):
    x_ND = truth.x_ND[:200].double().requires_grad_()
    logits_NC = x_ND @ truth.readout.W_DC.double()
    torch.nn.functional.cross_entropy(logits_NC, truth.readout.label_N[:200], reduction="sum").backward()
    torch.testing.assert_close(truth.gradient_ND[:200].double(), x_ND.grad, rtol=1e-3, atol=1e-4)


def test_gradient_is_orthogonal_to_large_features(world, truth):
    seen_F = (truth.gradient_ND[:2000] @ truth.features_FD.T).abs().mean(0)
    groups = world.groups()
    assert seen_F[groups["large"]].max() < 1e-4 * seen_F[groups["small"]].min()


def test_groups_have_stated_strength_l0_and_equal_frequencies(world, truth):
    dense_NF, groups = truth.codes.to_dense(), world.groups()
    for group, strength, l0 in (("large", 1.0, 12.0), ("small", 0.25, 4.0)):
        part_NG = dense_NF[:, groups[group]]
        active = part_NG > 0
        assert part_NG[active].mean().item() == pytest.approx(strength, rel=0.01)
        l0_N = active.sum(1).double()
        assert abs(l0_N.mean() - l0) < 4.5 * l0_N.std() / N**0.5
        expected = l0 / len(groups[group])
        assert (active.double().mean(0) - expected).abs().max() < 5 * (expected / N) ** 0.5


def test_labels_are_drawn_from_softmax_of_logits(truth):
    probabilities_NC = (truth.x_ND @ truth.readout.W_DC).double().softmax(dim=1)
    seen_C = torch.bincount(truth.readout.label_N, minlength=16).double()
    deviation_C = (probabilities_NC * (1 - probabilities_NC)).sum(0).sqrt()
    assert ((seen_C - probabilities_NC.sum(0)).abs() < 4.5 * deviation_C).all()
    entropy = -(probabilities_NC * probabilities_NC.log().clamp_min(-100)).sum(1).mean().item()
    assert truth.readout.cross_entropy(truth.x_ND).mean().item() == pytest.approx(entropy, rel=0.03)
    # Labels depend on the rows: with rows of zeros, the cross entropy is much larger.
    assert entropy < 1 < truth.readout.cross_entropy(torch.zeros_like(truth.x_ND)).mean()
