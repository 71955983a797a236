"""Unigram and bigram baselines against their equations."""

from __future__ import annotations

import collections
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench_data.scripts.ngrams import KAPPAS, Bigram

V = 5
Documents = st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=20), min_size=1, max_size=6)


def probability(documents: list[list[int]], kappa: float, v: int, w: int) -> tuple[float, float]:
    """p(w) and p(w | v), by the equations in the docstring of the module."""
    c = collections.Counter(token for document in documents for token in document)
    pairs = collections.Counter(pair for document in documents for pair in itertools.pairwise(document))
    unigram = (c[w] + 1) / (c.total() + V)
    followed = sum(n for (first, _), n in pairs.items() if first == v)
    types = sum(first == v for first, _ in pairs)
    if followed == 0:
        return unigram, unigram
    a = followed / (followed + kappa * types)
    return unigram, a * pairs[v, w] / followed + (1 - a) * unigram


@settings(max_examples=50, deadline=None)
@given(documents=Documents, kappa=st.sampled_from(KAPPAS))
def test_losses_equal_the_equations(documents: list[list[int]], kappa: float) -> None:
    bigram = Bigram([np.array(document) for document in documents], vocab_size=V, kappa=kappa)
    contexts = np.array([[v, w] for v in range(V) for w in range(V)])
    unigram_losses, losses = bigram.unigram_losses(contexts), bigram.losses(contexts)
    for (v, w), got_unigram, got in zip(contexts.tolist(), unigram_losses[:, 0], losses[:, 0], strict=True):
        unigram, conditional = probability(documents, kappa, v, w)
        assert got_unigram == pytest.approx(-math.log(unigram))
        assert got == pytest.approx(-math.log(conditional))
    np.testing.assert_allclose(np.exp(-losses).reshape(V, V).sum(1), 1)
    np.testing.assert_allclose(np.exp(-unigram_losses).reshape(V, V).sum(1), 1)


@settings(max_examples=20, deadline=None)
@given(documents=Documents, other=st.lists(st.integers(0, V - 1), min_size=2, max_size=20))
def test_tuned_kappa_has_the_lowest_loss(documents: list[list[int]], other: list[int]) -> None:
    bigram = Bigram([np.array(document) for document in documents], vocab_size=V)
    contexts = np.array([other])
    best = bigram.tune_kappa(contexts)
    at_best = bigram.losses(contexts).mean()
    assert bigram.kappa == best
    for kappa in KAPPAS:
        bigram.kappa = kappa
        assert at_best <= bigram.losses(contexts).mean() + 1e-12
