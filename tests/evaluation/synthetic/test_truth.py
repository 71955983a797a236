"""Every world: seeds determine all bytes, parts share a dictionary, rows are sums of features."""

import pytest
import torch

from saebench.evaluation.synthetic import ReadoutWorld, SuperpositionWorld, TreeWorld, World, ZipfWorld
from saebench.evaluation.synthetic.truth import CHUNK_ROWS

WORLDS = [
    TreeWorld(level=3),
    ZipfWorld(n_features=40, d_in=16, true_l0=4),
    ReadoutWorld(n_large=30, n_small=8, d_in=24, l0_large=5, l0_small=2),
    SuperpositionWorld(n_features=60, d_in=16, n_trees=2, depth=2),
]


def bytes_of(truth):
    tensors = [
        truth.x_ND,
        truth.features_FD,
        truth.codes.values,
        truth.codes.indices,
        truth.codes.row_offsets,
    ]
    if truth.readout is not None:
        tensors += [truth.readout.W_DC, truth.readout.label_N, truth.gradient_ND]
    return [tensor.numpy().tobytes() for tensor in tensors]


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: type(world).__name__)
class TestEveryWorld:
    def test_seed_determines_every_byte(self, world: World):
        fields = {name: getattr(world, name) for name in world.__dataclass_fields__}
        again, other = type(world)(**fields), type(world)(**{**fields, "seed": 1})
        assert bytes_of(again.sample(300)) == bytes_of(world.sample(300))
        differ = [
            a != b for a, b in zip(bytes_of(other.sample(300)), bytes_of(world.sample(300)), strict=True)
        ]
        assert all(differ[:3])

    def test_parts_share_dictionary_and_no_rows(self, world: World):
        train, test = world.sample(300, part="train"), world.sample(300, part="test")
        assert torch.equal(train.features_FD, test.features_FD)
        same_NN = (train.x_ND[:, None] == test.x_ND[None]).all(-1)
        assert not same_NN[(train.x_ND != 0).any(1)].any()

    def test_rows_are_sums_of_their_features(self, world: World):
        truth = world.sample(CHUNK_ROWS + 300)
        dense_NF = truth.codes.to_dense()
        assert dense_NF.shape == (CHUNK_ROWS + 300, truth.n_features)
        torch.testing.assert_close(truth.x_ND, dense_NF @ truth.features_FD, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(truth.features_FD.norm(dim=1), torch.ones(truth.n_features))
        assert (truth.codes.values > 0).all()
        torch.testing.assert_close(truth.frequency(), (dense_NF > 0).double().mean(0))

    def test_smaller_sample_is_start_of_larger_one(self, world: World):
        few, many = world.sample(CHUNK_ROWS + 5), world.sample(CHUNK_ROWS + 700)
        assert torch.equal(few.x_ND, many.x_ND[: CHUNK_ROWS + 5])
        assert torch.equal(few.codes.to_dense(), many.codes.to_dense()[: CHUNK_ROWS + 5])

    def test_groups_hold_valid_feature_indices(self, world: World):
        for indices in world.groups().values():
            assert len(indices) and indices.min() >= 0 and indices.max() < len(world.features_FD)
