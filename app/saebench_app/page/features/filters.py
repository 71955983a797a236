"""The controls above the table of features; their values are kept in the URL."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import streamlit as st

from saebench.store.query import FeatureStore
from saebench_app.components import CONTROL_WIDTH
from saebench_app.session import Here
from saebench_app.url import Range
from saebench_app.view import View

PILLS: dict[str, tuple[str, object]] = {
    "alive": ("dead", "hide"),
    "dead": ("dead", "only"),
    "not dense": ("dense", "hide"),
    "dense": ("dense", "only"),
    "explained": ("explained", "only"),
    "unexplained": ("explained", "hide"),
    "exclusive": ("exclusive", "only"),
    "shared": ("exclusive", "hide"),
    "bookmarked": ("bookmarked", True),
    "labeled": ("labeled", True),
}
"""Kind of feature -> field of the view, and the value of it that asks for this kind."""

NEEDED = {"explained": "explained", "exclusive": "crosscoder"}
"""Field of the view -> the table of the store that its pills need."""


@dataclass(frozen=True)
class Scale:
    """A slider: the field of the view that it sets, from ``low`` to ``high``."""

    field: str
    label: str
    low: float
    high: float
    format: str
    help: str

    @property
    def step(self) -> float:
        return 0.1 if self.field == "log_density" else (self.high - self.low) / 100

    def inside(self, chosen: Range | None) -> tuple[float, float]:
        """A range of the URL as the slider can show it."""
        low, high = chosen or (None, None)
        low, high = (self.low if low is None else low), (self.high if high is None else high)
        return min(max(low, self.low), self.high), max(min(high, self.high), self.low)

    def range(self, chosen: tuple[float, float]) -> Range | None:
        """The range that the slider is set to; an end at its bound leaves that side open."""
        low = chosen[0] if chosen[0] > self.low else None
        high = chosen[1] if chosen[1] < self.high else None
        return None if low is None and high is None else (low, high)


def find_scales(store: FeatureStore) -> dict[str, Scale]:
    """Field -> slider, of those whose column the store has."""
    lowest = math.floor(-math.log10(max(store.info()["n_tokens"], 2)))
    scales = [
        Scale(
            "log_density",
            "Density (log10)",
            float(lowest),
            0.0,
            "%.1f",
            "Activation density: share of the tokens on which the feature fires.",
        ),
        Scale(
            "max_act",
            "Max activation",
            0.0,
            _rounded(_end(store, "max_act")),
            "%.3g",
            "The largest activation on the indexed text.",
        ),
        Scale(
            "similarity",
            "Decoder similarity",
            0.0,
            1.0,
            "%.2f",
            "Cosine similarity with the nearest other decoder direction.",
        ),
    ]
    if store.has("token"):
        scales += [
            Scale(
                "token_share",
                "Top-token share",
                0.0,
                1.0,
                "%.2f",
                "Share of the feature's activations that are on its top token.",
            ),
            Scale(
                "selectivity",
                "Selectivity",
                0.0,
                1.0,
                "%.2f",
                "Share of the top token's occurrences on which the feature fires.",
            ),
        ]
    if "effect" in store.tables:
        low, high = _end(store, "loss_effect", descending=False), _end(store, "loss_effect")
        scales.append(
            Scale(
                "loss_effect",
                "Loss effect",
                -_rounded(-low) if low < 0 else 0.0,
                _rounded(high),
                "%.2g",
                "Mean change of the model's loss when the feature is ablated, in nats per token.",
            )
        )
    if "crosscoder" in store.tables:
        scales.append(
            Scale(
                "norm_share",
                "Norm share",
                0.0,
                1.0,
                "%.2f",
                "Share of the last site in the decoder norm; with two sites, 0 is the first alone.",
            )
        )
    if "explained" in store.tables:
        scales.append(
            Scale(
                "score",
                "Explanation score",
                0.0,
                1.0,
                "%.2f",
                "F1 of a rule, 2 x balanced accuracy - 1 of a text; on held-out documents.",
            )
        )
    return {scale.field: scale for scale in scales}


def _end(store: FeatureStore, column: str, *, descending: bool = True) -> float:
    values = store.features([column], order_by=column, descending=descending, limit=1)[column]
    return float(values.iloc[0]) if len(values) and not math.isnan(float(values.iloc[0] or 0)) else 0.0


def _rounded(top: float) -> float:
    """``top`` to two digits, upwards; 1 when it is not positive."""
    if not top > 0:
        return 1.0
    unit = 10.0 ** (math.floor(math.log10(top)) - 1)
    return round(math.ceil(top / unit) * unit, 12)


def filters(here: Here, scales: Mapping[str, Scale]) -> None:
    view = here.view
    tables = here.store.tables
    kinds = [kind for kind in PILLS if NEEDED.get(PILLS[kind][0], "feature") in tables]
    shown: dict[str, Any] = {
        "text": view.text,
        "regex": view.regex,
        "kinds": pressed(view, kinds),
        **{field: scale.inside(getattr(view, field)) for field, scale in scales.items()},
    }
    st.session_state.update(shown)

    def apply() -> None:
        chosen = {name: st.session_state[name] for name in shown if name in st.session_state}
        for field, scale in scales.items():
            untouched = chosen[field] == shown[field]
            chosen[field] = getattr(view, field) if untouched else scale.range(chosen[field])
        kinds_now = press(view, kinds, chosen.pop("kinds"))
        here.show(replace(view, **chosen, **kinds_now, page=1))

    with st.container(horizontal=True, gap="small", vertical_alignment="bottom"):
        st.text_input(
            "Search",
            placeholder="token, explanation or label",
            key="text",
            on_change=apply,
            width=230,
            help="Part of the top token, the explanation or the label. Case is ignored.",
        )
        st.toggle(
            "Regex", key="regex", on_change=apply, help="Read the search as a regular expression (RE2)."
        )
        for field in ("log_density", "max_act"):
            _slider(scales[field], apply)
        rest = [scale for field, scale in scales.items() if field not in ("log_density", "max_act")]
        bounded = sum(getattr(view, scale.field) is not None for scale in rest)
        with st.popover(f"More ranges ({bounded})" if bounded else "More ranges"):
            for scale in rest:
                _slider(scale, apply)
    st.pills("Show only features that are", kinds, selection_mode="multi", key="kinds", on_change=apply)


def _slider(scale: Scale, apply: Any) -> None:
    st.slider(
        scale.label,
        scale.low,
        scale.high,
        step=scale.step,
        format=scale.format,
        key=scale.field,
        on_change=apply,
        width=CONTROL_WIDTH,
        help=scale.help,
    )


def pressed(view: View, kinds: list[str]) -> list[str]:
    """The pills that are on in a view."""
    return [kind for kind in kinds if getattr(view, PILLS[kind][0]) == PILLS[kind][1]]


def press(view: View, kinds: list[str], chosen: list[str]) -> dict[str, Any]:
    """Fields of the view once ``chosen`` are on; of two that exclude each other, the new one wins."""
    defaults = View(sae=view.sae)
    fields = {PILLS[kind][0]: getattr(defaults, PILLS[kind][0]) for kind in kinds}
    before = pressed(view, kinds)
    for kind in sorted(chosen, key=lambda kind: kind not in before):
        fields[PILLS[kind][0]] = PILLS[kind][1]
    return fields
