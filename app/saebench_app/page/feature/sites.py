"""The sites of a feature: what a transcoder reads and writes, a crosscoder's decoder norm at each site."""

from __future__ import annotations

from typing import Any

from saebench.core.formatting import is_absent, number, share
from saebench_app.components.head import Head
from saebench_app.components.statistics import Statistic
from saebench_app.components.table import Cell, Heading, table
from saebench_app.session import Here
from saebench_app.sites import reads, site_label, writes

SITES = Head(
    "Decoder norm at each site",
    "Norms are divided by the standard deviation of the site's activations. The share is of their sum.",
)


def site_tiles(row: dict[str, Any], here: Here) -> list[Statistic]:
    """Tiles for a transcoder or crosscoder; none for an SAE of one site."""
    info = here.store.info()
    if here.store.has("crosscoder"):
        if is_absent(row["main_site"]):
            return [Statistic("Sites", "none", "its decoder row is 0")]
        kind = "exclusive" if row["exclusive"] else "shared"
        note = f"{share(row['main_share'])} at {site_label(row['main_site'], info)}"
        return [Statistic("Sites", kind, note, row["main_share"], "largest share of the decoder norm")]
    if info["sites"] == info["targets"]:
        return []
    skip = "with a skip" if info["skip"] else ""
    return [Statistic("Reads", reads(info)), Statistic("Writes", writes(info), skip)]


def show_sites(here: Here, row: dict[str, Any]) -> None:
    """The decoder norm of a crosscoder's feature at each site."""
    if not here.store.has("crosscoder"):
        return
    info = here.store.info()
    rows = []
    for site in here.store.site_norms(row["feature"]).to_dict("records"):
        absent = is_absent(site["share"])
        rows.append(
            [
                Cell(site_label(site["name"], info)),
                Cell(number(site["norm"]), exact=site["norm"]),
                Cell("") if absent else Cell(share(site["share"]), site["share"], bar=site["share"]),
            ]
        )
    headings = [Heading("site", align="left"), Heading("norm"), Heading("share")]
    table(headings, rows, name=SITES.title, key="sites", head=SITES)
