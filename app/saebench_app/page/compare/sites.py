"""Shared and exclusive features of a crosscoder: what two models, or two layers, have in common."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import streamlit as st

from saebench.core.formatting import count, number, share
from saebench.store.schema import EXCLUSIVE_ABOVE
from saebench_app.components.head import Head
from saebench_app.components.histogram import Bar, histogram
from saebench_app.components.statistics import Statistic, statistics
from saebench_app.components.table import Cell, Heading, table, text_cell, token_cell
from saebench_app.session import Here
from saebench_app.sites import site_label
from saebench_app.view import View

if TYPE_CHECKING:
    import pandas as pd

BINS = 20
LISTED = 50
"""Exclusive features shown of each site."""
COLUMNS = (
    "feature", "norm_share", "main_site", "main_share", "exclusive", "site_cos", "density", "top_token",
    "explanation",
)  # fmt: skip


def show_sites(here: Here) -> None:
    """The histogram of the norm shares of the crosscoder that is open, and the features of one site alone."""
    info = here.store.info()
    names = [site["name"] for site in info["sites"]]
    alive = here.store.features(COLUMNS, flags={"dead": False})
    exclusive = alive[alive["exclusive"].astype(bool)]
    st.subheader(
        "Shared and exclusive features",
        help="Each feature of a crosscoder writes all sites. Its decoder norm at a site, divided by the "
        "standard deviation of the site's activations, gives the site's share of the sum. Features with a "
        f"share of more than {EXCLUSIVE_ABOVE} at one site are exclusive to it. Exclusive features also "
        "arise between models that do not differ: compare with such a pair.",
    )
    counts = exclusive["main_site"].value_counts()
    written = int(alive["main_site"].notna().sum())
    tiles = [Statistic("Shared", count(written - len(exclusive)), exact=written - len(exclusive))]
    for name in names:
        n = int(counts.get(name, 0))
        part = f"{share(n / written)} of {count(written)}" if written else ""
        tiles.append(Statistic(f"Only {site_label(name, info)}", count(n), part, n))
    statistics(tiles, key="site-counts")
    left, right = st.columns([9, 11], gap="medium")
    with left:
        _histogram(here, alive, [site_label(name, info) for name in names])
    with right:
        for at, name in enumerate(names):
            _exclusive(here, exclusive[exclusive["main_site"] == name], site_label(name, info), at)


def _histogram(here: Here, alive: pd.DataFrame, labels: list[str]) -> None:
    """Of the share of the second of two sites, with links to its features; of several, of the largest."""
    import numpy as np

    two = len(labels) == 2
    shares = alive["norm_share" if two else "main_share"].dropna().to_numpy(dtype=float)
    counts, edges = np.histogram(shares, BINS, (0, 1))
    listed = replace(here.view.cleared(), dead="hide", sort="norm_share", descending=False)
    bars = [
        Bar(
            int(n),
            f"{int(n):,} features with a share from {edges[at]:.2f} to {edges[at + 1]:.2f}",
            _between(listed, float(edges[at]), float(edges[at + 1])) if two and n else "",
        )
        for at, n in enumerate(counts)
    ]
    axis = f"norm share: 0 only {labels[0]}, 1 only {labels[1]}" if two else "largest norm share of a site"
    histogram(
        bars,
        name=f"Norm shares of {len(shares):,} features",
        edges=["0", "0.5", "1"],
        axis=axis,
        key="norm-shares",
        head=Head("Relative decoder norms", "Click a bar to list its features." if two else ""),
    )


def _between(listed: View, low: float, high: float) -> str:
    return replace(listed, norm_share=(round(low, 6), round(high, 6))).url("features")


def _exclusive(here: Here, features: pd.DataFrame, label: str, at: int) -> None:
    if features.empty:
        return
    text = here.store.has("token")
    shown = features.sort_values(["main_share", "feature"], ascending=[False, True]).head(LISTED)
    headings = [Heading("feature", align="left"), *map(Heading, ("share", "site cosine", "density"))]
    headings += [Heading("top token", align="left")] if text else []
    headings += [Heading("name", align="left", help="its label, or else its explanation")]
    rows = [_row(here, row, text) for row in shown.to_dict("records")]
    note = f"The {LISTED} with the largest share of {len(features):,}." if len(features) > LISTED else ""
    head = Head(f"Only {label}", note)
    table(headings, rows, name=f"Features of {label} alone", key=f"only-{at}", height="18rem", head=head)


def _row(here: Here, row: dict[str, Any], text: bool) -> list[Cell]:
    feature, cosine = int(row["feature"]), row["site_cos"]
    cells = [
        Cell(str(feature), exact=feature, href=here.view.url("feature", f=feature)),
        Cell(share(row["main_share"]), exact=row["main_share"], bar=row["main_share"]),
        Cell("") if cosine != cosine else Cell(number(cosine), exact=cosine),
        Cell(share(row["density"]), exact=row["density"]),
    ]
    cells += [token_cell(row["top_token"])] if text else []
    return [*cells, text_cell(here.names.get(feature, row["explanation"]))]
