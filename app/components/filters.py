"""The controls above a list of features; what they say is kept in the URL."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import streamlit as st

from saebench.store.query import FeatureStore
from saebench_app.session import Here
from saebench_app.view import SHOWN, Range

WIDTH = 165
"""In pixels: two controls side by side on a telephone, all in one line on a wide screen."""


@dataclass(frozen=True)
class Bounds:
    """What the sliders run over: log10 of the density, and the largest activation of a feature."""

    log_density: tuple[float, float]
    max_act: tuple[float, float]


def find_bounds(store: FeatureStore) -> Bounds:
    largest = store.features(["max_act"], order_by="max_act", descending=True, limit=1)["max_act"]
    top = float(largest.iloc[0]) if len(largest) and largest.iloc[0] > 0 else 1.0
    unit = 10.0 ** (math.floor(math.log10(top)) - 1)
    lowest = math.floor(-math.log10(max(store.info()["n_tokens"], 2)))
    return Bounds((float(lowest), 0.0), (0.0, round(math.ceil(top / unit) * unit, 12)))


def filters(here: Here, bounds: Bounds) -> None:
    view = here.view
    shown: dict[str, Any] = {
        "text": view.text,
        "log_density": _inside(view.log_density, bounds.log_density),
        "max_act": _inside(view.max_act, bounds.max_act),
        "dead": view.dead,
        "dense": view.dense,
    }
    st.session_state.update(shown)

    def apply() -> None:
        chosen = {name: st.session_state[name] for name in shown if name in st.session_state}
        for name in ("log_density", "max_act"):
            untouched = chosen[name] == shown[name]
            chosen[name] = getattr(view, name) if untouched else _range(chosen[name], getattr(bounds, name))
        here.show(replace(view, **chosen, page=1))

    with st.container(horizontal=True, gap="small"):
        if here.store.has("token"):
            st.text_input(
                "Top token contains", placeholder="any text", key="text", on_change=apply, width=WIDTH
            )
        low, high = bounds.log_density
        st.slider(
            "Density, log10", low, high, step=0.1, format="%.1f", key="log_density", on_change=apply,
            width=WIDTH,
        )  # fmt: skip
        low, high = bounds.max_act
        st.slider(
            "Largest activation", low, high, step=high / 100, format="%.3g", key="max_act", on_change=apply,
            width=WIDTH,
        )  # fmt: skip
        for flag, meaning in (
            ("dead", "fire on no token"),
            ("dense", "fire on more than a tenth of the tokens"),
        ):
            st.segmented_control(
                flag.title(),
                SHOWN,
                key=flag,
                on_change=apply,
                required=True,
                help=f"Features that {meaning}.",
            )


def _inside(chosen: Range | None, bounds: tuple[float, float]) -> tuple[float, float]:
    """A range of the URL as a slider can show it."""
    low, high = chosen or (None, None)
    low, high = (bounds[0] if low is None else low), (bounds[1] if high is None else high)
    return min(max(low, bounds[0]), bounds[1]), max(min(high, bounds[1]), bounds[0])


def _range(chosen: tuple[float, float], bounds: tuple[float, float]) -> Range | None:
    """What a slider says; an end at its bound leaves that side open."""
    low = chosen[0] if chosen[0] > bounds[0] else None
    high = chosen[1] if chosen[1] < bounds[1] else None
    return None if low is None and high is None else (low, high)
