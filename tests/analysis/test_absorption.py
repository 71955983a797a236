"""Absorption on a tree of features: planted pairs are found, and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saebench.activations.cache import ActivationCache
from saebench.analysis import absorption
from saebench.analysis.absorption import absorbed
from saebench.core.errors import UserError
from saebench.evaluation.synthetic import TreeWorld
from saebench.evaluation.synthetic.tree import CHILDREN
from saebench.saes.base import SAE
from saebench.saes.registry import architecture

PLANTED = {(parent, child) for parent, children in enumerate(CHILDREN) for child in children}
N_HELD_OUT = 2000


def pursuit(rows_FD: Tensor) -> SAE:
    """Matching pursuit over a dictionary: takes the atom that explains most, until the residual is zero."""
    sae_class = architecture("matching-pursuit")
    sae: SAE = sae_class(sae_class.Spec(d_sae=len(rows_FD), k=4, tolerance=1e-3), rows_FD.shape[1])
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(rows_FD))
    return sae.eval()


def swallowed(features_FD: Tensor, pairs: set[tuple[int, int]] = PLANTED) -> Tensor:
    """The dictionary in which the atom of a child is the sum of its own and its parent's feature."""
    rows_FD = features_FD.clone()
    for parent, child in pairs:
        rows_FD[child] += features_FD[parent]
    return rows_FD


MakeTree = Callable[[int], tuple[Tensor, ActivationCache]]


@pytest.fixture(scope="module")
def make_tree(
    tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., ActivationCache]
) -> MakeTree:
    """``make_tree(level)``: the features [20, 20], and a cache of 2,000 held-out rows."""

    def make(level: int) -> tuple[Tensor, ActivationCache]:
        world = TreeWorld(level=level)
        x_ND = torch.cat([piece.x_ND for piece in world.chunks(20 * N_HELD_OUT)])
        path = tmp_path_factory.mktemp("trees") / f"level-{level}"
        return world.features_FD, make_cache(path, x_ND, dtype="fp32")

    return make


@pytest.mark.parametrize("level", [0, 4, 8])
def test_exactly_the_planted_pairs_are_found(make_tree: MakeTree, level: int) -> None:
    features_FD, cache = make_tree(level)
    found = absorbed(pursuit(swallowed(features_FD)), cache, quiet=True)
    assert set(zip(found["general"], found["specific"], strict=True)) == PLANTED
    assert (found["n_silent"] <= found["n_absorbed"]).all()
    np.testing.assert_allclose(found["share"], found["n_absorbed"] / found["n_specific"], rtol=1e-6)
    assert found["share"].is_monotonic_decreasing


@pytest.mark.parametrize("level", [0, 4, 8])
def test_true_features_give_no_pairs(make_tree: MakeTree, level: int) -> None:
    features_FD, cache = make_tree(level)
    assert absorbed(pursuit(features_FD), cache, quiet=True).empty


def test_only_children_of_the_planted_parent_are_found(
    make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    features_FD, cache = make_tree(2)
    sae = pursuit(swallowed(features_FD, {(1, 14), (1, 16)}))
    found = absorbed(sae, cache, quiet=True)
    assert set(zip(found["general"], found["specific"], strict=True)) == {(1, 14), (1, 16)}
    monkeypatch.setattr(absorption, "BLOCK_BYTES", 8 * 20 * 7)  # 7 rows at a time
    again = absorbed(sae, cache, quiet=True)
    assert again.drop(columns="written").equals(found.drop(columns="written"))
    assert absorbed(sae, cache, at_least=N_HELD_OUT, quiet=True).empty
    assert len(absorbed(sae, cache, share=0.99, quiet=True)) < 2


def test_result_does_not_depend_on_decoder_norms(make_tree: MakeTree) -> None:
    """Decoder rows of other norms, with values that compensate."""
    features_FD, cache = make_tree(3)
    sae = pursuit(swallowed(features_FD))

    class Longer(type(sae)):  # type: ignore[misc]
        def encode_rows(self, x_ND: Tensor, **how: Any) -> Any:
            codes = sae.encode_rows(x_ND)
            return codes.with_values(codes.values / self.length_F[codes.indices.long()])

    longer = Longer(sae.spec, sae.d_in).eval()
    longer.length_F = torch.linspace(0.2, 5, 20)
    with torch.no_grad():
        longer.W_dec.copy_(sae.W_dec * longer.length_F[:, None])
    expected, found = absorbed(sae, cache, quiet=True), absorbed(longer, cache, quiet=True)
    assert found[["general", "specific", "n_silent"]].equals(expected[["general", "specific", "n_silent"]])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"share": 0}, "share is 0; give a number greater than 0"),
        ({"cosine": 1.5}, "cosine is 1.5; give a number greater than 0 and at most 1"),
        ({"rows": 0}, "rows is 0; it must be at least 1"),
        ({"at_least": 0}, "at_least is 0; it must be at least 1"),
        ({"cache": None}, "the cache that the SAE was trained on is not recorded"),
        ({"sae": pursuit(torch.eye(5))}, "name the hook"),
        ({"hook": "blocks.9"}, "no hook 'blocks.9'"),
    ],
)
def test_invalid_arguments_raise_user_error(
    tiny_cache: ActivationCache, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        absorbed(**{"sae": pursuit(torch.eye(32)), "cache": tiny_cache, "quiet": True, **changes})


def test_run_uses_its_own_cache_and_hook(run: Path) -> None:
    absorbed(run, rows=200, quiet=True)
