"""Random numbers from hashes: they depend on the hashed values and a seed, not on the order of the work."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64, a bijection of 64-bit numbers; changes ``x`` in place and returns it."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(31)
    return x


def hash_random(a: NDArray[Any], b: NDArray[Any] | int, seed: int) -> NDArray[np.uint64]:
    """64 random bits for each pair of ``a`` and ``b``, determined by the pair and ``seed``."""
    x = np.asarray(a).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = x + np.asarray(b).astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
    return splitmix64(x + np.uint64(seed % 2**64))


def uniform_below(random_bits: NDArray[np.uint64], n: NDArray[Any] | int) -> NDArray[np.int64]:
    """A uniform number from 0 to n - 1 for each item of ``random_bits``; n is at most 2^32."""
    scaled: NDArray[np.int64] = (
        (random_bits >> np.uint64(32)) * np.asarray(n).astype(np.uint64) >> np.uint64(32)
    ).astype(np.int64)
    return scaled
