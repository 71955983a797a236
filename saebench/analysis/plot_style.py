"""The style of the figures: colors, axes, notes and token labels.

Orange is activation; blue is its opposite or a second series. Further series use colors that can be told
apart with the common kinds of color blindness (Okabe and Ito 2008). Backgrounds are transparent and text is
gray, so that a figure is readable on a light and on a dark page.
"""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING, Any

from saebench.core.errors import UserError
from saebench.core.formatting import visible

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

HOT, COLD = "#e8770c", "#2f7fc1"
KINDS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8A7F00", "#7F7F7F")
TEXT, LINE = "#7a7a7a", "rgba(128, 128, 128, 0.25)"
HEAT = [[0.0, "rgba(232, 119, 12, 0.0)"], [0.15, "rgba(232, 119, 12, 0.25)"], [1.0, HOT]]
SCALE = "Cividis"
"""The color scale of numbers that are not activations; readable with every kind of color blindness."""

LOWEST = -0.2
"""log10 of the start of a logarithmic axis of counts: a bin with a count of 1 is still visible."""


def styled(figure: go.Figure, x: str | None, y: str | None, *, height: int = 260) -> go.Figure:
    """Apply the common style to ``figure`` and set the titles of its axes."""
    axis: dict[str, Any] = {
        "gridcolor": LINE, "linecolor": LINE, "zerolinecolor": LINE, "automargin": True,
    }  # fmt: skip
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    if x is not None:
        figure.update_xaxes(title={"text": x})
    if y is not None:
        figure.update_yaxes(title={"text": y})
    return figure.update_layout(
        template="none", height=height, margin={"l": 8, "r": 8, "t": 28, "b": 8}, showlegend=False,
        paper_bgcolor="rgba(0, 0, 0, 0)", plot_bgcolor="rgba(0, 0, 0, 0)", font={"color": TEXT},
    )  # fmt: skip


def counts(count: Any) -> dict[str, Any]:
    """A logarithmic axis of counts, from just below 1 to just above the largest."""
    highest = max(math.log10(max(int(count.max()), 1)) + 0.1, 0.5) if len(count) else 0.5
    return {"type": "log", "dtick": 1, "range": [LOWEST, highest]}


def note(figure: go.Figure, text: str) -> None:
    """Write ``text`` above the plot, on the left."""
    figure.add_annotation(
        text=text, xref="paper", yref="paper", x=0, y=1, xanchor="left", yanchor="bottom", showarrow=False,
        font={"color": TEXT},
    )  # fmt: skip


def token_label(token: str) -> str:
    """A token as a label: white space is made visible, and HTML is escaped."""
    return html.escape(visible(token, spaces="all"), quote=False)


def require_columns(frame: pd.DataFrame, name: str, origin: str, *columns: str) -> None:
    """Raise a UserError when the argument ``name`` is not a table with all of ``columns``."""
    missing = [column for column in columns if column not in getattr(frame, "columns", ())]
    if missing:
        raise UserError(f"{name} has no column {missing[0]!r}; give {origin}")
