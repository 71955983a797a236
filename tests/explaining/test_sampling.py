"""Windows that are shown to a model and windows that it is asked about share no document and no context."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.explaining.prompting import marked, one_line
from saebench.explaining.sampling import Sampler
from saebench.explaining.token_index import TokenIndex
from saebench.store import open_store
from saebench.store.folds import TEST, TRAIN, fold_of
from tests.store.small_store import VOCAB


@pytest.fixture(scope="module")
def world(wide_store):
    """``(index, firings of every feature, contexts, activations at each place of every feature)``."""
    with open_store(wide_store) as store:
        index = TokenIndex(store)
        contexts = [store.context(ctx) for ctx in range(store.info()["n_contexts"])]
        places = [
            {(row.ctx, row.pos) for row in store.activations(feature).itertuples()} for feature in range(22)
        ]
        return index, index.firings(store, 0, 22), contexts, places


@settings(max_examples=60, deadline=None)
@given(feature=st.integers(0, 21), n=st.integers(1, 12), window=st.integers(4, 40), seed=st.integers(0, 9))
def test_shown_and_scored_windows_share_no_context_or_document(world, feature, n, window, seed):
    index, firings, contexts, places = world
    sampler = Sampler(index, n=n, window=window, seed=seed)
    drawn = sampler.draw(feature, *firings[feature])
    asked = drawn.positive + drawn.negative
    assert {fold_of([w.doc])[0] for w in drawn.shown} <= {TRAIN}
    assert {fold_of([w.doc])[0] for w in asked} <= {TEST}
    used = [w.ctx for w in drawn.shown + asked]
    assert len(used) == len(set(used))
    assert len(drawn.shown) <= n and len(drawn.negative) <= n and len(drawn.positive) <= 2 * n
    for w in drawn.shown + asked:
        context = contexts[w.ctx]
        positions = range(w.start, w.start + len(w.tokens))
        assert 1 <= len(w.tokens) <= window
        assert list(w.tokens) == context["tokens"][w.start : w.start + len(w.tokens)]
        assert {context["docs"][pos] for pos in positions} == {w.doc}
        assert [pos for pos in positions if (w.ctx, pos) in places[feature]] == list(w.fires)
        assert bool(w.fires) == (w not in drawn.negative)
    other = Sampler(index, n=n, window=window, seed=seed)
    other.draw((feature + 1) % 22, *firings[(feature + 1) % 22])
    assert other.draw(feature, *firings[feature]) == drawn


def test_sampler_draws_all_kinds_of_examples(world):
    index, firings, _, _ = world
    drawn = Sampler(index, n=8, window=8, seed=0).draw(3, *firings[3])
    assert (len(drawn.shown), len(drawn.positive), len(drawn.negative)) == (8, 16, 8)
    often = {index.token_N[0][row] for row in firings[3][0]}
    assert sum(bool(often & set(w.tokens)) for w in drawn.negative) >= 4
    assert max(firings[3][1][index.fold_N[firings[3][0]] == TRAIN]) in [
        value
        for row, value in zip(*firings[3], strict=True)
        if any(w.ctx == index.ctx_N[row] for w in drawn.shown)
    ]


def test_marked_text_brackets_firings(world):
    index, firings, _, _ = world
    for w in Sampler(index, n=6, window=12, seed=1).draw(5, *firings[5]).shown:
        text = marked(w, w.fires, VOCAB)
        assert text.replace("<<", "").replace(">>", "") == marked(w, (), VOCAB)
        assert "\n" not in one_line(text)
