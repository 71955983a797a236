"""UserError: the exception for problems that the user can solve."""

from __future__ import annotations

import unicodedata

_MOST_CHARACTERS = 3000
_NOT_SHOWN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Categories of characters that end a line, change its direction, or cannot be printed."""


class UserError(ValueError):
    """A problem that the user can solve: a wrong name, a damaged file, a full disk.

    The text is one sentence: what was expected, what was found (with its name and value), and what to do.
    The command line prints it without a traceback and exits with code 2; in Python it is an ordinary
    ValueError. Programming errors are ``assert`` or other exceptions (exit code 1, with a traceback).

    Sentences name values of files. Whatever these hold, the text is one line that can be printed.
    """

    def __init__(self, text: object = "") -> None:
        super().__init__(one_line(str(text)))


def one_line(text: str) -> str:
    """``text`` without line breaks, control characters and lone surrogates, and cut if it is very long."""
    if not text.isprintable():
        text = "".join(" " if unicodedata.category(c) in _NOT_SHOWN else c for c in text)
        text = " ".join(text.split())
    half = _MOST_CHARACTERS // 2
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:half]} ... {text[-half:]}"
