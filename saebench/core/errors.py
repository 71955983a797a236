"""UserError: the exception for problems that the user can solve."""

from __future__ import annotations


class UserError(ValueError):
    """A problem that the user can solve: a wrong name, a damaged file, a full disk.

    The text is one sentence: what was expected, what was found (with its name and value), and what to do.
    The command line prints it without a traceback and exits with code 2; in Python it is an ordinary
    ValueError. Programming errors are ``assert`` or other exceptions (exit code 1, with a traceback).
    """
