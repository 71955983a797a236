"""The distribution of one feature's activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from saebench.analysis import figures

if TYPE_CHECKING:
    import pandas as pd


def histogram(bins: pd.DataFrame, *, key: str) -> None:
    """``bins`` has columns lo, hi, count."""
    figure = figures.histogram(bins)
    figure.update_layout(height=190, margin={"l": 0, "r": 0, "t": 6, "b": 0})
    figure.update_xaxes(fixedrange=True)
    figure.update_yaxes(fixedrange=True)
    total, lo, hi = int(bins["count"].sum()), bins["lo"].iloc[0], bins["hi"].iloc[-1]
    st.plotly_chart(
        figure,
        key=key,
        config={"displayModeBar": False},
        alt=f"Histogram of {total:,} activations from {lo:.3g} to {hi:.3g}",
    )
