"""Tokens as text, byte for byte: a token of a byte-level tokenizer may be a part of a character."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence


def token_text(token: bytes) -> str:
    r"""A token by itself; bytes that are not a whole character appear as ``\xf0``."""
    return token.decode("utf-8", "backslashreplace")


def pieces(tokens: Sequence[bytes]) -> list[str]:
    """The text of each token of a window, such that their concatenation is the decoded window.

    ``"".join(pieces(tokens)) == b"".join(tokens).decode("utf-8", "replace")`` for any bytes. A character
    spread over several tokens is on the first of them; the others get the remaining text, possibly ''.
    """
    try:
        return [token.decode() for token in tokens]
    except UnicodeDecodeError:
        pass
    ends = list(itertools.accumulate(map(len, tokens)))
    shown: list[list[str]] = [[] for _ in tokens]
    for offset, character in _characters(b"".join(tokens)):
        shown[bisect.bisect_right(ends, offset)].append(character)
    return ["".join(characters) for characters in shown]


def _characters(data: bytes) -> list[tuple[int, str]]:
    """Each character of ``data.decode("utf-8", "replace")`` with the offset of its first byte."""
    found: list[tuple[int, str]] = []
    start = 0
    while start < len(data):
        try:
            good, bad, resume = data[start:].decode(), None, len(data)
        except UnicodeDecodeError as error:
            good, bad = data[start : start + error.start].decode(), start + error.start
            resume = start + error.end
        offset = start
        for character in good:
            found.append((offset, character))
            offset += len(character.encode())
        if bad is not None:
            found.append((bad, "\N{REPLACEMENT CHARACTER}"))
        start = resume
    return found
