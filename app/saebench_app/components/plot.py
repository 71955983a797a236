"""A figure of saebench.analysis.figures on a page: as wide as its container, with a text alternative."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

if TYPE_CHECKING:
    import plotly.graph_objects as go


def plot(figure: go.Figure, *, key: str, alt: str, height: int | None = None) -> None:
    if height is not None:
        figure.update_layout(height=height)
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    figure.update_layout(margin={"l": 0, "r": 0, "b": 0}, legend=legend)
    st.plotly_chart(figure, key=key, config={"displayModeBar": False}, alt=alt)
