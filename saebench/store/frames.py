"""What a DataFrame from DuckDB is made into before people compute with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def signed(frame: pd.DataFrame) -> pd.DataFrame:
    """``frame`` with signed integers for unsigned ones: differences of positions must not wrap around."""
    kinds = {
        name: "Int64" if str(kind).startswith("U") else "int64"
        for name, kind in frame.dtypes.items()
        if str(kind).lower().startswith("uint")
    }
    made: pd.DataFrame = frame.astype(kinds)
    return made
