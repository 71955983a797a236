"""Folds: documents from which explanations are made, and documents on which they are scored.

Documents 2i and 2i + 1 always go to different folds, so each fold has half of the documents, even of few. A
hash of i decides which of the two goes where, so the fold of a document is the same in every store.

The fold of an example is that of the document of its token. When documents are packed into one context, its
window may show the end of the previous document or the start of the next one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from saebench.core.hashing import hash_random

TRAIN, TEST = 0, 1
FOLDS = {"train": TRAIN, "test": TEST}
"""Name -> stored number of a fold."""


def fold_of(doc_S: NDArray[Any]) -> NDArray[np.uint8]:
    """[S]: TRAIN or TEST for each document number."""
    doc = np.asarray(doc_S).astype(np.uint64)
    fold: NDArray[np.uint8] = (
        (doc & np.uint64(1)) ^ (hash_random(doc >> np.uint64(1), 0, 1) >> np.uint64(63))
    ).astype(np.uint8)
    return fold
