"""The distribution of one feature's activations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import streamlit as st

if TYPE_CHECKING:
    import pandas as pd

HOT = "#e8770c"
"""The colour of activation, as in ``static/base.css``."""

LOWEST = -0.2
"""log10 of where the counts' axis begins: a bin with one token is still seen."""


def histogram(bins: pd.DataFrame, *, key: str) -> None:
    """``bins`` has columns lo, hi, count."""
    lo, hi = bins["lo"].to_numpy(), bins["hi"].to_numpy()
    bars: dict[str, Any] = {
        "type": "bar",
        "x": (lo + hi) / 2,
        "y": bins["count"].to_numpy(),
        "width": hi - lo,
        "marker": {"color": HOT, "line": {"width": 0}},
        "customdata": bins[["lo", "hi"]].to_numpy(),
        "hovertemplate": "%{y:,} tokens<br>%{customdata[0]:.3g} to %{customdata[1]:.3g}<extra></extra>",
    }
    layout: dict[str, Any] = {
        "height": 190,
        "margin": {"l": 0, "r": 0, "t": 6, "b": 0},
        "bargap": 0,
        "xaxis": {"title": {"text": "activation"}, "automargin": True, "fixedrange": True},
        "yaxis": {
            "type": "log",
            "dtick": 1,
            "range": [LOWEST, max(math.log10(max(bins["count"].max(), 1)) + 0.1, 0.5)],
            "title": {"text": "tokens (log)"},
            "automargin": True,
            "fixedrange": True,
        },
        "showlegend": False,
    }
    total = int(bins["count"].sum())
    st.plotly_chart(
        {"data": [bars], "layout": layout},
        key=key,
        config={"displayModeBar": False},
        alt=f"Histogram of {total:,} activations from {lo[0]:.3g} to {hi[-1]:.3g}",
    )
