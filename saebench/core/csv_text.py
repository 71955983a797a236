"""CSV that spreadsheet programs open as data: no cell is a formula, and no character is invisible."""

from __future__ import annotations

import csv
import io
import numbers
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from saebench.core.formatting import as_text, is_absent, visible

if TYPE_CHECKING:
    import pandas as pd

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""With what a cell begins that a spreadsheet computes; the last four are the full-width forms."""


def csv_cell(value: Any) -> Any:
    """``value`` as a cell of a CSV file: a number as it is, anything else as text.

    A text that a spreadsheet would compute gets an apostrophe before it; control characters and those that
    reorder a line are named.

    >>> csv_cell("=1+1"), csv_cell("a\\tb"), csv_cell(-3)
    ("'=1+1", 'a⇥b', -3)
    """
    if isinstance(value, bool | numbers.Number) or str(getattr(value, "dtype", "")) == "bool":
        return value
    if is_absent(value):
        return None
    text = as_text(value)
    return "'" * text.startswith(FORMULA) + visible(text, spaces="kept")


def csv_line(values: Iterable[Any]) -> str:
    """One line of a CSV file."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(map(csv_cell, values))
    return line.getvalue()


def as_csv(frame: pd.DataFrame) -> bytes:
    """A table as CSV in UTF-8, without its index. Columns of numbers are written as they are."""
    import pandas as pd

    frame, has_semicolon = frame.copy(deep=False), False
    for place, kind in enumerate(frame.dtypes):
        if not (pd.api.types.is_numeric_dtype(kind) or pd.api.types.is_bool_dtype(kind)):
            cells = [csv_cell(value) for value in frame.iloc[:, place]]
            frame.isetitem(place, pd.Series(cells, index=frame.index, dtype=object))
            has_semicolon |= any(isinstance(cell, str) and ";" in cell for cell in cells)
    frame.columns = pd.Index([csv_cell(str(name)) for name in frame.columns])
    # Spreadsheets of countries with a decimal comma take ; for the separator: what follows would be a cell.
    quoting = csv.QUOTE_NONNUMERIC if has_semicolon else csv.QUOTE_MINIMAL
    return str(frame.to_csv(index=False, lineterminator="\n", quoting=quoting)).encode()
