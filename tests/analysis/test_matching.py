"""One-to-one matching of the latents of two SAEs, and splits of a narrow SAE in a wide one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saebench.activations.cache import ActivationCache
from saebench.analysis import correlations, matching
from saebench.analysis.matching import METHODS, match, splits
from saebench.core.errors import UserError
from saebench.runs.run import load
from saebench.saes.base import SAE
from saebench.saes.registry import architecture


def sae_of(W_dec_MD: Tensor) -> SAE:
    """A TopK SAE with these decoder rows, tied."""
    sae_class = architecture("topk")
    sae: SAE = sae_class(sae_class.Spec(d_sae=len(W_dec_MD), k=min(3, len(W_dec_MD))), W_dec_MD.shape[1])
    with torch.no_grad():
        sae.W_dec.copy_(W_dec_MD)
        sae.W_enc_MD.copy_(W_dec_MD)
    return sae.eval()


def random_sae(n: int, d: int, seed: int) -> SAE:
    rows_ND = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return sae_of(torch.nn.functional.normalize(rows_ND))


def permuted(sae: SAE, order_M: Tensor) -> SAE:
    """An SAE whose latent j is latent ``order[j]`` of ``sae``."""
    other = copy.deepcopy(sae)
    with torch.no_grad():
        for name in ("W_dec", "W_enc_MD", "b_enc"):
            getattr(other, name).copy_(getattr(sae, name)[order_M])
    return other


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, make_cache: Callable[..., ActivationCache]) -> Any:
    """2,000 rows of 8 dimensions, of which the last 100 are held out."""
    x_ND = torch.randn(2000, 8, generator=torch.Generator().manual_seed(7))
    return make_cache(tmp_path_factory.mktemp("caches") / "random", x_ND, dtype="fp32")


def dense(sae: SAE, cache: ActivationCache) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return sae.encode(cache.activations()[cache.held_out]).to_dense().double().numpy()


@pytest.mark.parametrize("by", METHODS)
def test_permuted_copy_is_matched_exactly(run: Path, tiny_cache: ActivationCache, hook: str, by: str) -> None:
    sae = load(run)
    order_M = torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(1))
    found = match(run, permuted(sae, order_M), by, hook=hook, quiet=True)
    pairs = found.pairs
    if by == "activation":  # a dead latent has correlation 0 with every other
        with torch.no_grad():
            held_out_ND = tiny_cache.activations(hook)[tiny_cache.held_out]
            fires = sae.encode(held_out_ND).to_dense().std(0) > 0
        pairs = pairs[fires.numpy()[pairs["feature_a"]]]
        assert 20 < len(pairs) == int(fires.sum())
        assert found.n_rows == len(held_out_ND)
    else:
        assert (found.mean_similarity, found.stability) == (pytest.approx(1.0), 1.0)
        assert len(pairs) == sae.d_sae
    assert order_M[torch.tensor(pairs["feature_b"].to_numpy())].tolist() == pairs["feature_a"].tolist()
    np.testing.assert_allclose(pairs["similarity"], 1, atol=1e-5)
    assert pairs["best_of_a"].tolist() == pairs["feature_b"].tolist()
    assert pairs["best_of_b"].tolist() == pairs["feature_a"].tolist()
    assert found.unmatched.empty


@pytest.mark.parametrize("pieces", [False, True])
def test_activation_similarity_equals_numpy(
    cache: ActivationCache, monkeypatch: pytest.MonkeyPatch, pieces: bool
) -> None:
    if pieces:  # 7 rows, and 1 latent of a, at a time
        monkeypatch.setattr(matching, "MOST_ROWS", 7)
        monkeypatch.setattr(correlations, "BLOCK_BYTES", 1000)
    a, b = random_sae(12, 8, 1), random_sae(20, 8, 2)
    found = match(a, b, "activation", cache, quiet=True)
    expected = np.corrcoef(dense(a, cache).T, dense(b, cache).T)[:12, 12:]
    pairs = found.pairs
    np.testing.assert_allclose(
        pairs["similarity"], expected[pairs["feature_a"], pairs["feature_b"]], atol=1e-6
    )
    assert pairs["best_of_a"].tolist() == expected.argmax(1)[pairs["feature_a"]].tolist()
    assert pairs["best_of_b"].tolist() == expected.argmax(0)[pairs["feature_b"]].tolist()
    np.testing.assert_allclose(pairs["best_of_a_similarity"], expected.max(1)[pairs["feature_a"]], atol=1e-6)
    np.testing.assert_allclose(pairs["best_of_b_similarity"], expected.max(0)[pairs["feature_b"]], atol=1e-6)
    assert found.mean_similarity == pytest.approx(pairs["similarity"].mean())
    assert found.stability == (pairs["similarity"] >= 0.7).mean()
    alone = found.unmatched
    assert alone["side"].tolist() == ["b"] * 8
    assert sorted([*alone["feature"], *pairs["feature_b"]]) == list(range(20))
    assert alone["best"].tolist() == expected.argmax(0)[alone["feature"]].tolist()
    np.testing.assert_allclose(alone["similarity"], expected.max(0)[alone["feature"]], atol=1e-6)


def test_rows_limits_the_held_out_rows_read(cache: ActivationCache) -> None:
    a, b = random_sae(5, 8, 1), random_sae(5, 8, 2)
    found = match(a, b, "activation", cache, rows=40, quiet=True)
    expected = np.corrcoef(dense(a, cache)[:40].T, dense(b, cache)[:40].T)[:5, 5:]
    pairs = found.pairs
    assert found.n_rows == 40
    np.testing.assert_allclose(
        pairs["similarity"], expected[pairs["feature_a"], pairs["feature_b"]], atol=1e-6
    )


def test_dead_latent_has_similarity_zero(cache: ActivationCache) -> None:
    a = random_sae(5, 8, 1)
    with torch.no_grad():
        a.b_enc[2] = -1e6
    pairs = match(a, a, "activation", cache, quiet=True).pairs.set_index("feature_a")
    assert pairs["similarity"][2] == 0
    np.testing.assert_allclose(pairs["similarity"].drop(2), 1, atol=1e-6)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000))
@settings(deadline=None)
def test_matching_maximizes_the_sum(n_a: int, n_b: int, seed: int) -> None:
    a, b = random_sae(n_a, 4, seed), random_sae(n_b, 4, seed + 1)
    cosine = (a.W_dec @ b.W_dec.T).abs().detach().numpy()
    if n_a > n_b:
        cosine = cosine.T
    ways = itertools.permutations(range(cosine.shape[1]), len(cosine))
    best = max(cosine[range(len(cosine)), list(way)].sum() for way in ways)
    found = match(a, b, quiet=True)
    assert found.mean_similarity == pytest.approx(best / len(cosine), abs=1e-6)
    assert found.pairs["similarity"].is_monotonic_decreasing
    assert len(found.unmatched) == abs(n_a - n_b)


def test_planted_splits_are_found() -> None:
    """Of 12 orthonormal rows, 3 and 7 are split into two orthogonal rows each and 5 into three similar
    rows; 11 is removed, and the others are unchanged."""
    axes = torch.eye(16)
    parts = [[axes[i]] for i in range(12)]
    parts[3] = [axes[3] + axes[12], axes[3] - axes[12]]
    parts[7] = [axes[7] + 0.9 * axes[13], axes[7] - 0.9 * axes[13]]
    parts[5] = [axes[5] + 0.1 * axes[14], axes[5] + 0.2 * axes[15], axes[5]]
    parts[11] = [axes[11] + 2 * axes[15]]
    wide = torch.nn.functional.normalize(torch.stack([row for rows in parts for row in rows]))
    a, b = sae_of(axes[:12]), sae_of(wide)
    found = splits(a, b)
    assert found["feature_a"].tolist() == [5, 5, 5, 3, 3, 7, 7]
    assert found["n"].tolist() == [3, 3, 3, 2, 2, 2, 2]
    assert found["feature_b"].tolist() == [8, 6, 7, 3, 4, 10, 11]
    by_hand = [1, 1 / 1.01**0.5, 1 / 1.04**0.5, 0.5**0.5, 0.5**0.5, 1 / 1.81**0.5, 1 / 1.81**0.5]
    np.testing.assert_allclose(found["cosine"], by_hand, atol=1e-6)
    assert splits(a, b, at_least=3)["feature_a"].unique().tolist() == [5]
    assert splits(a, b, threshold=0.72)["feature_a"].unique().tolist() == [5, 7]
    assert splits(a, a).empty


def test_splits_do_not_depend_on_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = random_sae(6, 4, 1), random_sae(40, 4, 2)
    whole = splits(a, b)
    assert not whole.empty
    monkeypatch.setattr(matching, "BLOCK_BYTES", 1)
    again = splits(a, b)
    assert again.drop(columns="cosine").equals(whole.drop(columns="cosine"))
    np.testing.assert_allclose(again["cosine"], whole["cosine"], atol=1e-6)


def test_memory_is_announced_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    a = random_sae(5, 4, 1)
    match(a, a)
    assert capsys.readouterr().err == "match: matching 5 with 5 latents takes up to 0.5 GiB\n"
    match(a, a, quiet=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"by": "encoder"}, "by is 'encoder'; give 'decoder' or 'activation'"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": 1.5}, "threshold is 1.5; give a number between -1 and 1"),
        ({"rows": 1}, "rows is 1; a correlation needs at least 2"),
        ({"memory_gib": 0.1}, r"5 with 5 latents takes up to 0.5 GiB, and memory_gib is 0.1; raise it"),
        ({"by": "activation"}, r"the cache that the SAE was trained on .*cache=\.\.\."),
        ({"by": "activation", "cache": Path("nowhere")}, "nowhere"),
        (
            {"by": "activation", "cache": "tiny"},
            r"in memory does not record its hook.*, one of blocks",
        ),
        ({"by": "activation", "cache": "tiny", "hook": "blocks.0.hook_resid_post"}, "has 32; name the hook"),
        ({"by": "activation", "cache": "tiny", "hook": "blocks.0.resid"}, "no hook 'blocks.0.resid'"),
        ({"a": 7}, "a is 7; give a run directory"),
        ({"b": "nowhere"}, "nowhere holds no SAE"),
        ({"b": random_sae(5, 4, 1)}, "a has d_in 8 and b has d_in 4"),
        ({"b": sae_of(torch.full((5, 8), torch.nan))}, "the weights of a or b hold NaN"),
    ],
)
def test_invalid_arguments_raise_user_error(
    tiny_cache: ActivationCache, settings: dict[str, Any], sentence: str
) -> None:
    a = random_sae(5, 8, 1)
    if settings.get("cache") == "tiny":
        settings = {**settings, "cache": tiny_cache}
    with pytest.raises(UserError, match=sentence):
        match(**{"a": a, "b": a, "quiet": True, **settings})


def test_incompatible_rows_raise_user_error(
    tmp_path: Path, make_cache: Callable[..., ActivationCache], cache: ActivationCache
) -> None:
    a = random_sae(5, 8, 1)
    with pytest.raises(UserError, match=r"1 of the 20 rows of .* are held out"):
        match(a, a, "activation", make_cache(tmp_path / "few", torch.randn(20, 8), dtype="fp32"), quiet=True)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"threshold": 0}, "threshold is 0; give a cosine greater than 0"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"at_least": 1}, "at_least is 1; it must be at least 2"),
        ({"b": random_sae(4, 8, 1)}, "a has 5 latents and b only 4; give the narrower SAE first"),
        ({"b": random_sae(9, 4, 1)}, "a has d_in 8 and b has d_in 4"),
    ],
)
def test_invalid_splits_arguments_raise_user_error(settings: dict[str, Any], sentence: str) -> None:
    a = random_sae(5, 8, 1)
    with pytest.raises(UserError, match=sentence):
        splits(**{"a": a, "b": a, **settings})
