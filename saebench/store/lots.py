"""Lots: random choices that depend on what is chosen and a seed, not on the order or the grouping of work."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The last steps of splitmix64: 64 bits that look random, the same for the same ``x``."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x


def lots(a: NDArray[Any], b: NDArray[Any] | int, seed: int) -> NDArray[np.uint64]:
    """64 random bits for each pair of ``a`` and ``b`` and the seed."""
    x = np.asarray(a).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = x + np.asarray(b).astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
    return mixed(x + np.uint64(seed % 2**64))


def below(lot: NDArray[np.uint64], n: NDArray[Any] | int) -> NDArray[np.int64]:
    """A number from 0 to n - 1 for each lot, uniform; n at most 2^32."""
    scaled: NDArray[np.int64] = (
        (lot >> np.uint64(32)) * np.asarray(n).astype(np.uint64) >> np.uint64(32)
    ).astype(np.int64)
    return scaled
