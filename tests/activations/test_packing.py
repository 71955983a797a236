"""Packing keeps every token, never mixes held-out documents with others, and stops at max_rows."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench.activations.packing import batches, pack
from saebench.sources.text import Document, is_held_out

SEPARATOR, BOS = 1000, 1001


def encode(document: Document) -> list[int]:
    return [*map(ord, document.text), SEPARATOR]


texts = st.lists(st.text(st.characters(codec="ascii"), max_size=30), max_size=40)


@given(texts, st.integers(2, 12), st.booleans())
@settings(max_examples=200, deadline=None)
def test_contexts_spell_the_documents(texts, ctx, with_bos):
    documents = [Document(text) for text in texts]
    bos = BOS if with_bos else None
    contexts = list(pack(documents, encode, ctx=ctx, bos=bos))
    for held_out in (False, True):
        stream = [context for context in contexts if context.held_out == held_out]
        numbers = [i for i, text in enumerate(texts) if is_held_out(text) == held_out]
        assert all(len(context) == ctx for context in stream[:-1])
        bodies = [context.tokens[with_bos:].tolist() for context in stream]
        expected = [encode(documents[i]) for i in numbers]
        assert list(itertools.chain(*bodies)) == list(itertools.chain(*expected))
        docs = itertools.chain(*(context.docs[with_bos:].tolist() for context in stream))
        assert list(docs) == [i for i, ids in zip(numbers, expected, strict=True) for _ in ids]
        assert all(context.docs[0] == context.docs[int(with_bos)] for context in stream)
        assert all((context.tokens[0] == BOS) == with_bos for context in stream)


@given(
    texts,
    st.integers(2, 12),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.integers(1, 300),
    st.sets(st.one_of(st.just(SEPARATOR), st.integers(32, 126))),
)
@settings(max_examples=200, deadline=None)
def test_batches_keep_exactly_max_rows(texts, ctx, batch_size, keep_first, keep_last, max_rows, exclude):
    kept_positions = {"keep_first": keep_first, "keep_last": keep_last, "exclude": sorted(exclude)}
    n_excluded = []

    def contexts():
        return pack((Document(text) for text in texts), encode, ctx=ctx)

    def rows(limit):
        made = batches(contexts(), ctx=ctx, batch_size=batch_size, max_rows=limit, **kept_positions)
        found, shapes = [], []
        for batch in made:
            shapes.append(batch.tokens_BT.shape)
            n_excluded.append(batch.n_excluded)
            found += batch.tokens_BT[batch.keep_BT].tolist()
            lengths = np.array([len(context) for context in batch.contexts])
            assert (batch.tokens_BT[np.arange(ctx) >= lengths[:, None]] == 0).all()
            assert (lengths > (not keep_first) + (not keep_last)).all()
        assert all(shape == (batch_size, ctx) for shape in shapes[:-1])
        return found

    everything = rows(10**9)
    ends = slice(0 if keep_first else 1, None if keep_last else -1)
    possible = [token for context in contexts() for token in context.tokens[ends].tolist()]
    assert everything == [token for token in possible if token not in exclude]
    assert sum(n_excluded) <= len(possible) - len(everything)
    if everything:
        n_excluded.clear()
        rows(len(everything))
        last = max(i for i, token in enumerate(possible) if token not in exclude)
        assert sum(n_excluded) == sum(token in exclude for token in possible[:last])
    assert rows(max_rows) == everything[:max_rows]
