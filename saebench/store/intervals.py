"""Confidence intervals and standard errors of the statistics of a feature.

Both take tokens as independent draws. Tokens of one document are not quite, so the truth is a little wider.
"""

from __future__ import annotations

import math

from saebench.core.errors import UserError

Z_95 = 1.959963984540054
"""Two-sided 95% quantile of the normal distribution."""


def wilson(n: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's interval ``(low, high)`` for a fraction, from ``n`` successes in ``total`` trials.

    >>> [round(end, 4) for end in wilson(0, 1000)]
    [0.0, 0.0038]

    Raises:
        UserError: ``total`` is not positive, or ``n`` is not between 0 and it.
    """
    if not 0 <= n <= total or total <= 0:
        raise UserError(f"{n} of {total} is not a fraction; n must be between 0 and total, total at least 1")
    p, z2 = n / total, z * z / total
    middle = (p + z2 / 2) / (1 + z2)
    half = z / (1 + z2) * math.sqrt(p * (1 - p) / total + z2 / (4 * total))
    return (0.0 if n == 0 else max(middle - half, 0.0)), (1.0 if n == total else min(middle + half, 1.0))


def standard_error(std: float, n: int) -> float | None:
    """Standard error of a mean of ``n`` values whose population standard deviation is ``std``; None below 2.

    >>> standard_error(2.0, 5)
    1.0
    """
    return std / math.sqrt(n - 1) if n > 1 else None
