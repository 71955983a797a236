"""Feature specifications such as 3,17,40-49."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from saebench.core.errors import UserError


def feature_numbers(words: Iterable[str | int], d_sae: int) -> list[int]:
    """The features that ``words`` name, each once, in the order given.

    >>> feature_numbers(["3,17", "40-42", 3], 100)
    [3, 17, 40, 41, 42]

    Raises:
        UserError: words that name none, or a feature that the SAE has not.
    """
    return list(dict.fromkeys(number for word in words for number in _numbers(str(word), d_sae)))


def _numbers(words: str, d_sae: int) -> Iterator[int]:
    for word in words.split(","):
        match = re.fullmatch(r"\s*(\d{1,10})\s*(?:-\s*(\d{1,10})\s*)?", word, re.ASCII)
        if match is None:
            raise UserError(f"{word!r} names no features; write them like 3,17,40-49")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise UserError(f"{word!r} names no features; write the smaller number first")
        if last >= d_sae:
            raise UserError(f"feature {last} is not in the SAE; it has 0 to {d_sae - 1}")
        yield from range(first, last + 1)
