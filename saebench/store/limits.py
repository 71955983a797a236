"""Limits for queries whose cost depends on user input: a time limit, and checks of regular expressions."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from saebench.core.errors import UserError
from saebench.store.database import first_line

if TYPE_CHECKING:
    import duckdb

LONGEST_PATTERN = 500


class TimeLimitError(UserError):
    """A query was stopped because it reached the time limit."""


@contextlib.contextmanager
def time_limit(cursor: duckdb.DuckDBPyConnection, seconds: float) -> Iterator[None]:
    """Interrupt the query that ``cursor`` runs in the body after ``seconds``.

    Raises:
        TimeLimitError: it was interrupted.
    """
    import duckdb

    def stop() -> None:
        with contextlib.suppress(duckdb.Error):  # it may have ended, and been closed, just now
            cursor.interrupt()

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    except duckdb.InterruptException:
        raise too_slow(seconds) from None
    finally:
        timer.cancel()


def too_slow(seconds: float) -> TimeLimitError:
    return TimeLimitError(
        f"the question took longer than {seconds:g} s and was stopped; ask for less, "
        "or set the store's time_limit to more"
    )


@functools.lru_cache(maxsize=256)
def check_pattern(pattern: str) -> str:
    """``pattern`` if it is a regular expression of RE2, whose time is linear in the text it searches.

    Raises:
        UserError: it is not, or it is too long.
    """
    import duckdb

    if len(pattern) > LONGEST_PATTERN:
        raise UserError(
            f"the regular expression has {len(pattern)} characters; it may have {LONGEST_PATTERN} at most"
        )
    with duckdb.connect(":memory:") as connection:
        try:
            connection.execute("SELECT regexp_matches('', ?)", [pattern]).fetchall()
        except (duckdb.Error, UnicodeEncodeError) as error:
            reason = first_line(error).removeprefix("Invalid Input Error: ")
            raise UserError(
                f"{pattern!r} is not a regular expression ({reason}); correct it, or search for it as text"
            ) from None
    return pattern
