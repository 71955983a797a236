"""Features: the table of all of them, sorted and filtered by what the URL says."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import streamlit as st

from saebench.store.schema import FEATURE
from saebench_app.components.filters import Bounds, filters, find_bounds
from saebench_app.components.notice import notice
from saebench_app.components.table import Cell, Heading, table
from saebench_app.numbers import count, is_absent, number, share
from saebench_app.session import Here
from saebench_app.text import visible
from saebench_app.view import View

PATH = "features"
TITLE = "Features"
PER_PAGE = 100

Kind = Literal["id", "token", "count", "share", "number", "density", "size", "feature"]


@dataclass(frozen=True)
class Column:
    """A column of the table: ``name`` in the store, and the table of the store that it needs."""

    name: str
    label: str
    kind: Kind
    needs: str = "feature"


COLUMNS = (
    Column("feature", "feature", "id"),
    Column("top_token", "top token", "token", "token"),
    Column("top_token_share", "its share", "share", "token"),
    Column("logit_top", "promotes", "token", "logit"),
    Column("density", "density", "density"),
    Column("max_act", "max", "size"),
    Column("mean_act", "mean", "number"),
    Column("p50", "median", "number"),
    Column("p99", "p99", "number"),
    Column("n_act", "tokens", "count"),
    Column("n_ctx_act", "contexts", "count", "context"),
    Column("n_doc_act", "documents", "count", "document"),
    Column("entropy_tok", "entropy", "number", "token"),
    Column("enc_dec_cos", "enc·dec", "number"),
    Column("dec_max_cos", "nearest cos", "number"),
    Column("dec_nn", "nearest", "feature"),
)
SORTABLE = tuple(column.name for column in COLUMNS)
HELP = {column.name: column.help for column in FEATURE.columns}


def show(here: Here) -> None:
    view, store = here.view, here.store
    bounds = find_bounds(here.store)
    total, found = store.count_features(), store.count_features(**view.filters())
    st.title("Features")
    filters(here, bounds)
    if not found:
        notice("No feature passes these filters. Widen a range, or clear the text.", key="none")
        _clear(here)
        return
    last = math.ceil(found / PER_PAGE)
    page = min(view.page, last)
    columns = [column for column in COLUMNS if store.has(column.needs)]
    names = [*(column.name for column in columns), "dead", "dense"]
    first = (page - 1) * PER_PAGE
    rows = store.features(names, **view.filters(), **view.order(), limit=PER_PAGE, offset=first)
    headings = [*(_heading(column, view) for column in columns), Heading("", align="left")]
    cells = [_cells(row, columns, view, bounds) for row in rows.to_dict("records")]
    table(headings, cells, name="Features", key="features", height="calc(100vh - 17rem)")
    with st.container(horizontal=True, vertical_alignment="center"):
        of = f"{found:,} that pass, of {total:,}" if found < total else f"{total:,} features"
        st.caption(f"{first + 1:,} to {min(first + PER_PAGE, found):,} of {of}", width="content")
        if last > 1:
            st.session_state["page"] = page
            st.pagination(
                last, key="page", on_change=lambda: here.show(replace(view, page=st.session_state["page"]))
            )
        if not view.lists_all():
            _clear(here)


def _clear(here: Here) -> None:
    cleared = View(sae=here.view.sae, sort=here.view.sort, descending=here.view.descending)
    st.button("Clear filters", on_click=lambda: here.show(cleared), type="tertiary")


def _heading(column: Column, view: View) -> Heading:
    return Heading(
        column.label,
        align="left" if column.kind == "token" else "right",
        help=HELP[column.name],
        href=view.sorted_by(column.name).url(PATH),
        sorted=("descending" if view.descending else "ascending") if column.name == view.sort else "",
    )


def _cells(row: dict[str, Any], columns: list[Column], view: View, bounds: Bounds) -> list[Cell]:
    flags = " ".join(flag for flag in ("dead", "dense") if row[flag])
    return [
        *(_cell(row[column.name], column.kind, view, bounds) for column in columns),
        Cell(flags, kind="flag"),
    ]


def _cell(value: Any, kind: Kind, view: View, bounds: Bounds) -> Cell:
    if is_absent(value):
        return Cell("")
    if kind == "token":
        return Cell(visible(value, edges=True), kind="token")
    exact = value.item() if hasattr(value, "item") else value
    if kind in ("id", "feature"):
        return Cell(str(exact), exact=exact, href=view.url("feature", f=exact))
    if kind == "count":
        return Cell(count(exact), exact=exact)
    if kind == "share":
        return Cell(share(exact), exact=exact)
    if kind == "density":
        low, high = bounds.log_density
        return Cell(
            share(exact), exact=exact, bar=(math.log10(exact) - low) / (high - low) if exact > 0 else None
        )
    return Cell(number(exact), exact=exact, bar=exact / bounds.max_act[1] if kind == "size" else None)
