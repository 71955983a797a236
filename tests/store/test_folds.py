from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from saebench.store.folds import TEST, TRAIN, fold_of


@given(st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_fold_depends_on_document_only(docs):
    folds = fold_of(np.array(docs, dtype=np.uint32))
    assert folds.dtype == np.uint8
    assert set(folds.tolist()) <= {TRAIN, TEST}
    assert folds.tolist() == [int(fold_of(np.array([doc], dtype=np.int64))[0]) for doc in docs]


@given(st.integers(1, 5000))
def test_folds_have_half_of_the_documents_each(n):
    assert abs(int(fold_of(np.arange(n)).sum()) - n / 2) <= 0.5


def test_fold_within_pairs_of_documents_is_random():
    """With every second document in one fold, for example, all even years would be in it."""
    first = fold_of(np.arange(0, 20_000, 2)).astype(float)
    assert abs(first.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.05
