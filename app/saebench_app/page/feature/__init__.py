"""Feature: everything that the store knows about one latent."""

from __future__ import annotations

import streamlit as st

from saebench_app.components.statistics import statistics
from saebench_app.page.feature.common import PATH
from saebench_app.page.feature.examples import show_examples
from saebench_app.page.feature.explanations import show_explanations
from saebench_app.page.feature.header import show_header, show_lead, tiles
from saebench_app.page.feature.notes import notes
from saebench_app.page.feature.panels import (
    show_histogram,
    show_logits,
    show_positions,
    show_similar,
    show_tokens,
)
from saebench_app.page.feature.sites import show_sites, site_tiles
from saebench_app.session import Here

__all__ = ["PATH", "SECTION", "TITLE", "show"]

TITLE = "Feature"
SECTION = "Browse"


def show(here: Here) -> None:
    feature = here.feature()
    if feature is None:
        first = here.store.features(["feature"], **here.filters(), **here.view.order(), limit=1)["feature"]
        feature = int(first.iloc[0]) if len(first) else 0
    row = here.store.feature(feature)
    show_header(here, row)
    show_lead(here, row)
    notes(here, feature)
    statistics([*site_tiles(row, here), *tiles(row, here)], key="statistics")
    if "explanations" in here.view.open:
        show_explanations(here, row)
    left, right = st.columns([11, 9], gap="medium")
    with left:
        show_examples(here, row)
    with right:
        show_sites(here, row)
        show_histogram(here, row)
        show_logits(here, feature)
        show_tokens(here, row)
        show_similar(here, feature)
        show_positions(here, row)
