"""The one exception that means "the user must change something"."""

from __future__ import annotations


class UserError(ValueError):
    """Input or surroundings that a person can put right: a wrong name, a damaged file, a full disk.

    Its text is one sentence that names the thing, the value seen and the way out. The command line
    prints it without a traceback and exits with code 2; in Python it is an ordinary ValueError.
    Programmers' mistakes stay ``assert`` or other exceptions (exit code 1, with a traceback).
    """
