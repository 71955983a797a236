"""Maps, clusters and redundancy of decoder rows against planted or computed answers."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from saebench.analysis import geometry, umap
from saebench.analysis.geometry import METHODS, clusters, decoder_map, redundancy
from saebench.analysis.umap import fuzzy_graph, principal_layout, umap_layout
from saebench.core.errors import UserError
from saebench.saes.topk import TopKSAE


def sae_of(W_MD: Tensor) -> TopKSAE:
    sae = TopKSAE(TopKSAE.Spec(d_sae=len(W_MD), k=1), W_MD.shape[1])
    with torch.no_grad():
        sae.W_dec.copy_(W_MD)
    return sae


def random_rows(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def planted(n: int, n_groups: int, d: int = 24, noise: float = 0.12) -> tuple[Tensor, Tensor]:
    """Rows [n, d] of any norm around ``n_groups`` orthonormal directions, and the group of each."""
    group_M = torch.arange(n) % n_groups
    rows_MD = torch.eye(d)[group_M] + noise * random_rows(n, d)
    return rows_MD * (0.1 + torch.rand(n, 1, generator=torch.Generator().manual_seed(1))), group_M


def purity(points_M2: Tensor, group_M: Tensor, n: int = 5) -> float:
    """The fraction of the ``n`` nearest points of each point that belong to its group."""
    apart_MM = torch.cdist(points_M2, points_M2).fill_diagonal_(torch.inf)
    near_MN = apart_MM.topk(n, largest=False).indices
    return (group_M[near_MN] == group_M[:, None]).double().mean().item()


def test_pca_equals_singular_vectors() -> None:
    W_MD = random_rows(40, 7)
    unit = normalize(W_MD).double()
    centered = unit - unit.mean(0)
    _, _, axes = torch.linalg.svd(centered, full_matrices=False)
    expected = centered @ axes[:2].T
    found = decoder_map(sae_of(W_MD), n_clusters=3)
    assert found.columns.tolist() == ["feature", "x", "y", "cluster"]
    assert found["feature"].tolist() == list(range(40))
    for name, column in (("x", expected[:, 0]), ("y", expected[:, 1])):
        sign = math.copysign(1, float(column.numpy() @ found[name].to_numpy()))
        np.testing.assert_allclose(found[name], sign * column, atol=1e-6)
    mirrored = decoder_map(sae_of(torch.flip(W_MD, [0])), n_clusters=3)  # another order, the same map
    np.testing.assert_allclose(mirrored["x"][::-1], found["x"], atol=1e-6)
    np.testing.assert_allclose(mirrored["y"][::-1], found["y"], atol=1e-6)


def test_umap_layout_separates_groups_better_than_pca() -> None:
    rows_MD, group_M = planted(240, 12)
    near = umap_layout(normalize(rows_MD), 10, seed=0, rounds=200)
    assert purity(near, group_M) > 0.97
    assert purity(near, group_M) > purity(principal_layout(normalize(rows_MD)), group_M) + 0.1


@pytest.mark.parametrize("method", METHODS)
def test_equal_seeds_give_equal_maps(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(umap, "MANY_ROWS", 0)  # fewer rounds
    sae = sae_of(torch.cat([random_rows(30, 6), torch.ones(5, 6), torch.zeros(2, 6)]))  # copies, zeros
    first, again = (decoder_map(sae, method, n_clusters=4, seed=3) for _ in range(2))
    assert first.equals(again)
    assert np.isfinite(first[["x", "y"]].to_numpy()).all()
    assert first["cluster"].equals(clusters(sae, 4, seed=3)["cluster"])
    assert first.equals(decoder_map(sae, method, n_clusters=4, seed=4)) is False or method == "pca"


@settings(deadline=None)
@given(st.integers(4, 25), st.integers(2, 8), st.integers(0, 99))
def test_fuzzy_graph_equals_its_definition(n: int, k: int, seed: int) -> None:
    unit = normalize(random_rows(n, 5, seed)).double()
    k = min(k, n - 1)
    first, second, weight = fuzzy_graph(unit.float(), k)
    graph = torch.zeros(n, n)
    graph[first, second] = weight
    assert torch.equal(graph, graph.T) and not graph.diagonal().any()
    apart = (1 - unit @ unit.T).fill_diagonal_(torch.inf)
    sets = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        distance, other = apart[i].topk(k, largest=False)
        beyond, low, high = distance - distance[0], 1e-6, 1e3
        for _ in range(80):
            sigma = math.sqrt(low * high)
            low, high = (low, sigma) if torch.exp(-beyond / sigma).sum() > math.log2(k + 1) else (sigma, high)
        sets[i, other] = torch.exp(-beyond / high)
    torch.testing.assert_close(graph.double(), sets + sets.T - sets * sets.T, atol=2e-3, rtol=0)


def test_planted_clusters_are_found_and_numbered_by_size() -> None:
    rows_MD, _ = planted(60, 4)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    kept = order[[i for i, j in enumerate(order.tolist()) if not (j % 4 == 1 and j > 20)]]
    found = clusters(sae_of(rows_MD[kept]), 4)
    for _, group in found.groupby("cluster"):
        assert len({int(kept[feature]) % 4 for feature in group["feature"]}) == 1
    sizes = found["cluster"].value_counts().sort_index()
    assert sizes.is_monotonic_decreasing and sizes.tolist() == [15, 15, 15, 5]


@settings(deadline=None)
@given(st.integers(1, 20), st.data())
def test_every_latent_is_in_the_cluster_with_the_nearest_center(n: int, data: st.DataObject) -> None:
    rows_MD = random_rows(n, 3, data.draw(st.integers(0, 99)))
    if data.draw(st.booleans()):
        rows_MD[: n // 2] = rows_MD[0]  # copies
    n_clusters = data.draw(st.integers(1, n))
    found = clusters(sae_of(rows_MD), n_clusters, seed=data.draw(st.integers(0, 9)))
    cluster_M = torch.tensor(found["cluster"].tolist())
    assert sorted(set(cluster_M.tolist())) == list(range(n_clusters))  # none is empty
    unit = normalize(rows_MD)
    centres = normalize(torch.stack([unit[cluster_M == c].sum(0) for c in range(n_clusters)]))
    cosine = unit @ centres.T
    own = cosine.gather(1, cluster_M[:, None])[:, 0]
    np.testing.assert_allclose(found["cosine"], own, atol=1e-5)
    alone = torch.bincount(cluster_M)[cluster_M] == 1
    assert (own >= cosine.max(1).values - 1e-5)[~alone].all()


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(0, 99), st.sampled_from([0.2, 0.5, 0.9, 1.0]))
def test_redundancy_finds_all_pairs_above_the_threshold(n: int, seed: int, threshold: float) -> None:
    unit = normalize(random_rows(n, 3, seed))
    found = redundancy(sae_of(3 * unit), threshold=threshold)
    cosine = {(i, j): float(unit[i] @ unit[j]) for i, j in itertools.combinations(range(n), 2)}
    got = dict(
        zip(
            zip(found.pairs["feature"], found.pairs["other"], strict=True), found.pairs["cosine"], strict=True
        )
    )
    for pair, value in cosine.items():
        if abs(value - threshold) > 1e-5:
            assert (pair in got) == (value > threshold)
    for pair, value in got.items():
        assert value == pytest.approx(cosine[pair], abs=1e-5)
    assert found.share == len({i for pair in got for i in pair}) / n
    assert found.pairs["cosine"].is_monotonic_decreasing
    assert 1 - 1e-6 <= found.participation_ratio <= min(n, 3) + 1e-6
    assert 1 - 1e-6 <= found.effective_rank <= 3 + 1e-6


def test_result_does_not_depend_on_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = sae_of(random_rows(50, 4))
    whole, grouped = redundancy(sae, threshold=0.6), clusters(sae, 7)
    monkeypatch.setattr(geometry, "BLOCK_BYTES", 1)
    again = redundancy(sae, threshold=0.6)
    assert len(whole.pairs) > 20
    assert set(zip(again.pairs["feature"], again.pairs["other"], strict=True)) == set(
        zip(whole.pairs["feature"], whole.pairs["other"], strict=True)
    )
    assert clusters(sae, 7)["cluster"].equals(grouped["cluster"])


def test_effective_rank_counts_directions() -> None:
    even = redundancy(sae_of(torch.eye(6).repeat(3, 1)), threshold=0.99)
    assert (even.effective_rank, even.participation_ratio) == (pytest.approx(6), pytest.approx(6))
    assert (len(even.pairs), even.share) == (18, 1.0)
    one = redundancy(sae_of(torch.ones(5, 6)))
    assert (one.effective_rank, one.participation_ratio) == (pytest.approx(1, abs=1e-4), pytest.approx(1))
    uneven = redundancy(sae_of(torch.eye(2)[[0, 0, 0, 0, 1]]))  # s^2 = 4, 1
    p, q = 2 / 3, 1 / 3
    assert uneven.effective_rank == pytest.approx(math.exp(-p * math.log(p) - q * math.log(q)))
    assert uneven.participation_ratio == pytest.approx(25 / 17)


def test_run_directory_equals_sae_in_memory(run: Path) -> None:
    assert len(clusters(run, 5)) == len(decoder_map(run, n_clusters=2)) == 96


@pytest.mark.parametrize(
    ("function", "changes", "sentence"),
    [
        (decoder_map, {"method": "tsne"}, "method is 'tsne'; give 'pca' or 'umap'"),
        (decoder_map, {"neighbors": 1}, "neighbors is 1; give at least 2"),
        (decoder_map, {"n_clusters": 9}, "the number of clusters is 9; give 1 to 5"),
        (decoder_map, {"sae": sae_of(torch.ones(2, 4))}, "the SAE has 2 latents, but a map needs at least 3"),
        (clusters, {"n": 0}, "the number of clusters is 0; give 1 to 5"),
        (clusters, {"sae": 3}, "sae is 3; give a run directory"),
        (clusters, {"sae": "nowhere"}, "nowhere holds no SAE"),
        (clusters, {"sae": sae_of(torch.full((5, 4), torch.nan))}, "holds NaN or infinity"),
        (redundancy, {"threshold": 0.0}, "threshold is 0.0; give a cosine greater than 0 and at most 1"),
        (redundancy, {"threshold": math.nan}, "threshold is nan"),
    ],
)
def test_invalid_arguments_raise_user_error(function: Any, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        function(**{"sae": sae_of(random_rows(5, 4)), **({"n": 2} if function is clusters else {}),
                    **({"n_clusters": 2} if function is decoder_map else {}), **changes})  # fmt: skip


def test_too_many_pairs_raise_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "MOST_PAIRS", 9)
    with pytest.raises(UserError, match=r"more than 9 pairs have a cosine of at least 0.9; raise threshold"):
        redundancy(sae_of(torch.ones(5, 3)))
