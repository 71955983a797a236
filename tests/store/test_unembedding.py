"""The unembedding for the logits of a store, and the reasons when there is none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from saebench.core.errors import UserError
from saebench.saes.spec import SiteWidth
from saebench.sources import models
from saebench.store.logits import find_unembedding
from tests.store.small_store import D_IN, HOOK, VOCAB, SmallCache, small_unembedding

HASH = "ab" * 32
SITES = (SiteWidth(HOOK, D_IN),)


class Model:
    def __init__(self, hash: str = HASH, W_U: torch.Tensor | None = None) -> None:
        self.hash = hash
        self.info = SimpleNamespace(to_json=lambda: {"name": "small", "hash": hash})
        self._W_U = small_unembedding() if W_U is None else W_U

    def residual_hook(self, hook: str) -> bool:
        return "resid" in hook

    def unembedding(self, *, before_cap: bool = False) -> torch.Tensor:
        return self._W_U


@pytest.fixture
def cache():
    cache = SmallCache()
    cache.model = {"name": "small", "hash": HASH, "revision": "r1"}
    return cache


def answer(monkeypatch, model):
    asked = []

    def load(name, *, revision=None, **_):
        asked.append((name, revision))
        if isinstance(model, Exception):
            raise model
        return model

    monkeypatch.setattr(models, "load_model", load)
    return asked


def test_unembedding_of_cache_model(monkeypatch, cache):
    asked = answer(monkeypatch, Model())
    found, why = find_unembedding("cache", cache, SITES, VOCAB)
    assert torch.equal(found.W_U_DV, small_unembedding())
    assert found.site == HOOK and why == ""
    assert asked == [("small", "r1")]


def test_padded_unembedding_is_cut_to_vocabulary(monkeypatch, cache):
    answer(monkeypatch, Model(W_U=torch.randn(D_IN, len(VOCAB) + 5)))
    found, _ = find_unembedding("cache", cache, SITES, VOCAB)
    assert found.W_U_DV.shape == (D_IN, len(VOCAB))


@pytest.mark.parametrize(
    "trouble",
    [UserError("it is not there"), OSError("gone"), ImportError("no transformers"), Model(hash="cd" * 32)],
)
def test_failing_cache_model_omits_logits_with_one_line(monkeypatch, cache, capsys, trouble):
    answer(monkeypatch, trouble)
    found, why = find_unembedding("cache", cache, SITES, VOCAB)
    assert found is None
    assert "small" in why
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [
        (UserError("no model is called x"), "no model is called x"),
        (Model(hash="cd" * 32), "not the one that made the cache"),
        (Model(W_U=torch.randn(D_IN + 1, len(VOCAB))), r"shape \(13, 32\)"),
    ],
)
def test_wrong_named_model_raises_user_error(monkeypatch, cache, trouble, sentence):
    answer(monkeypatch, trouble)
    with pytest.raises(UserError, match=sentence):
        find_unembedding("x", cache, SITES, VOCAB)


def test_missing_model_gives_reason(monkeypatch, cache):
    asked = answer(monkeypatch, AssertionError("no model may be loaded"))
    assert "--model none" in find_unembedding("none", cache, SITES, VOCAB)[1]
    assert "no tokens" in find_unembedding("cache", SmallCache(text=False), SITES, None)[1]
    cache.model = None
    assert "does not say" in find_unembedding("cache", cache, SITES, VOCAB)[1]
    of_two = [SiteWidth(f"{n}:{HOOK}", D_IN) for n in range(2)]
    monkeypatch.setattr(SmallCache, "models", [{}, {}])
    assert "several models" in find_unembedding("x", cache, of_two, VOCAB)[1]
    assert asked == []


def test_logits_need_residual_stream_hook(monkeypatch, cache):
    answer(monkeypatch, Model())
    post = SiteWidth("blocks.0.mlp.hook_post", 3 * D_IN)
    found, why = find_unembedding("cache", cache, [post], VOCAB)
    assert found is None
    assert "residual stream" in why
    last = SiteWidth("blocks.1.hook_resid_post", D_IN)
    found, _ = find_unembedding("cache", cache, [*SITES, last, post], VOCAB)
    assert found.site == last.name
