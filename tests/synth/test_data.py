"""Data sets of the suite and their caches of rows and gradients."""

import pytest
import torch

from saebench.core.errors import UserError
from saebench.synth.data import claim_directory, data_sets, make_cache


def data_of(name, tokens=10_000, **options):
    (data,) = [
        data
        for data in data_sets([name.split("-")[0]], full=False, tokens=tokens, **options)
        if data.name == name
    ]
    return data


def test_cache_has_training_rows_and_gradients_of_world(tmp_path):
    data = data_of("readout")
    cache = make_cache(data, tmp_path, quiet=True)
    truth = data.world.sample(cache.n_rows, part="train")
    assert torch.equal(cache.activations()[:], truth.x_ND)
    assert torch.equal(cache.gradients()[:], truth.gradient_ND)
    assert (~cache.held_out).sum() >= 10_000 > cache.n_rows * 0.94
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["cache"]
    assert make_cache(data, tmp_path, quiet=True).hash == cache.hash


def test_full_suite_has_more_data_sets_and_rows_than_small_one():
    small, full = (
        data_sets(["superposition", "tree", "zipf", "readout"], full=full) for full in (False, True)
    )
    rest = ["zipf", "zipf-constant", "readout", "superposition"]
    assert [data.name for data in small] == ["tree-0", "tree-4", "tree-8", *rest]
    assert [data.name for data in full] == [*(f"tree-{level}" for level in range(9)), *rest]
    # As many rows as the tree's authors train on.
    assert all(data.tokens == 15_000 * 200 for data in full if data.kind == "tree")
    assert full[-1].d_sae == 1024 > full[-1].d_in
    assert all(a.tokens < b.tokens for a, b in zip(small[-4:], full[-4:], strict=True))


def test_directory_with_other_settings_is_refused(tmp_path):
    claim_directory(data_of("zipf"), tmp_path)
    claim_directory(data_of("zipf"), tmp_path)
    with pytest.raises(
        UserError, match=r"was made with tokens 10000, but this call has 20000; choose another"
    ):
        claim_directory(data_of("zipf", tokens=20_000), tmp_path)
    with pytest.raises(UserError, match=r"difficulty=lognormal .* has .*difficulty=constant"):
        claim_directory(data_of("zipf-constant"), tmp_path)
