"""Folds: documents from which explanations are made, and documents on which they are scored.

Documents 2i and 2i + 1 always go to different folds, so that both folds have half of them however few there
are; which of the two goes where is a hash of i. The fold of a document is thus the same in every store.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

TRAIN, TEST = 0, 1
FOLDS = {"train": TRAIN, "test": TEST}
"""Name -> stored number of a fold."""


def fold_of(doc_S: NDArray[Any]) -> NDArray[np.uint8]:
    """[S]: TRAIN or TEST for each document number."""
    doc = np.asarray(doc_S).astype(np.uint64)
    fold: NDArray[np.uint8] = (doc & np.uint64(1) ^ mixed(doc >> np.uint64(1)) >> np.uint64(63)).astype(
        np.uint8
    )
    return fold


def mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64: 64 bits that look random, the same for the same ``x``."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x
