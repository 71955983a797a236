"""Features: the table of all features, sorted and filtered as the URL says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import streamlit as st

from saebench.core.csv_text import as_csv
from saebench.core.errors import UserError
from saebench.core.formatting import count, is_absent, number, share, visible
from saebench_app.access import read_only
from saebench_app.components.notice import notice
from saebench_app.components.table import Cell, Heading, table, text_cell, token_cell
from saebench_app.page.features.columns import SORTABLE, Column, Kind, choose_columns, shown_columns
from saebench_app.page.features.filters import Scale, filters, find_scales
from saebench_app.session import Here, attempt
from saebench_app.view import LABEL, MOST_AMONG, View

if TYPE_CHECKING:
    import pandas as pd

PATH = "features"
TITLE = "Features"
SECTION = "Browse"
PER_PAGE = 100
SELECTED = "selected features"
"""Session key of SAE -> its selected features. One object, so that a file that is made later holds what is
selected then."""


def show(here: Here) -> None:
    scales = find_scales(here.store)
    with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
        st.title("Features", width="content")
        with st.container(horizontal=True, width="content"):
            choose_columns(here)
            _views(here)
    filters(here, scales)
    _hidden_filters(here)
    try:
        found = here.store.count_features(**here.filters())
    except UserError as error:  # an invalid pattern, or a list that was removed
        notice(str(error), key="refused", kind="error")
        _clear(here)
        return
    if not found:
        notice("No feature matches these filters. Widen a range, or clear the search.", key="none")
        _clear(here)
        return
    last = math.ceil(found / PER_PAGE)
    page = min(here.view.page, last)
    _listing(here, scales, found, page)
    _pages(here, found, page, last)


def _hidden_filters(here: Here) -> None:
    """The filters that no control shows."""
    if here.view.list:
        notice(f"Only the features of the list “{visible(here.view.list)}”.", key="of-list")
    if here.view.among:
        notice(f"Only {len(here.view.among)} selected features.", key="among")


@st.fragment
def _listing(here: Here, scales: dict[str, Scale], found: int, page: int) -> None:
    """The table and the actions on its rows; selecting a row redraws nothing else."""
    view, store = here.view, here.store
    columns = shown_columns(here)
    stored = [column.name for column in columns if column.name != LABEL]
    rows = store.features(
        [*dict.fromkeys(["feature", *stored, "dead", "dense"])],
        **here.filters(),
        **view.order(),
        limit=PER_PAGE,
        offset=(page - 1) * PER_PAGE,
    )
    headings = [*(_heading(column, view) for column in columns), Heading("marks", align="left")]
    cells = [_cells(row, columns, here, scales) for row in rows.to_dict("records")]
    selected = _selected()
    _actions(here, selected, found)
    table(
        headings,
        cells,
        name="Features",
        key="features",
        height="calc(100vh - 19rem)",
        selected=selected.get(store.sae, []),
        on_select=lambda features: selected.update({store.sae: features}),
    )


def _pages(here: Here, found: int, page: int, last: int) -> None:
    view, first = here.view, (page - 1) * PER_PAGE
    with st.container(horizontal=True, vertical_alignment="center"):
        total = here.store.info()["d_sae"]
        of = f"{found:,} matching features ({total:,} in all)" if found < total else f"{total:,} features"
        st.caption(f"{first + 1:,} to {min(first + PER_PAGE, found):,} of {of}", width="content")
        if last > 1:
            st.session_state["page"] = page

            def turn() -> None:
                here.show(replace(view, page=st.session_state["page"]))

            st.pagination(last, key="page", on_change=turn)
        if not view.lists_all():
            _clear(here)


def _selected() -> dict[str, list[int]]:
    selected: dict[str, list[int]] = st.session_state.setdefault(SELECTED, {})
    return selected


def _actions(here: Here, selected: dict[str, list[int]], found: int) -> None:
    """What can be done with the selected features, or with all that match when none is selected."""
    ticked = selected.get(here.store.sae, [])
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        if ticked:
            st.caption(f"{len(ticked):,} selected", width="content")
            only = replace(here.view.cleared(), among=tuple(ticked[:MOST_AMONG]))
            if st.button("Show only these", type="tertiary"):
                here.show(only)
                st.rerun()  # all of the page, of which this is a part
            if not read_only():
                _add_to_list(here, ticked)
            st.button("Clear selection", on_click=selected.clear, type="tertiary")
        else:
            st.caption(f"{found:,} features; select some to add them to a list", width="content")
        st.space("stretch")
        whose = "selected" if ticked else "listed"
        st.download_button(
            "CSV",
            lambda: as_csv(_frame(here, selected)),
            "features.csv",
            on_click="ignore",
            type="tertiary",
            help=f"All columns of the {whose} features.",
        )
        st.download_button(
            "Parquet",
            lambda: as_parquet(_frame(here, selected)),
            "features.parquet",
            on_click="ignore",
            type="tertiary",
            help=f"All columns of the {whose} features.",
        )


def _frame(here: Here, selected: dict[str, list[int]]) -> pd.DataFrame:
    """All columns and labels of the selected features, or of those listed, in the order of the table."""
    ticked = selected.get(here.store.sae)
    wanted = {"among": ticked} if ticked else here.filters()
    frame = here.store.features(**wanted, **here.view.order())
    frame.insert(1, LABEL, [here.names.get(feature) for feature in frame["feature"]])
    return frame


def as_parquet(frame: pd.DataFrame) -> bytes:
    data = BytesIO()
    frame.to_parquet(data, index=False)
    return data.getvalue()


def _add_to_list(here: Here, ticked: list[int]) -> None:
    with st.popover("Add to list", type="tertiary"):
        known = here.annotations.lists()["name"].tolist()
        name = st.selectbox(
            "List",
            known,
            index=None,
            accept_new_options=True,
            key="list-name",
            placeholder="a list, or the name of a new one",
        )

        def add() -> None:
            here.annotations.add_to_list(str(name), ticked)

        st.button("Add", key="add-chosen", on_click=attempt, args=(add,), disabled=not name)


def _views(here: Here) -> None:
    """Saved views: a link to each, and a field that saves the view on the screen."""
    popover = st.popover("Saved views", key="views-open", on_change="rerun")
    if not popover.open:
        return
    with popover:
        saved = here.annotations.views().to_dict("records")
        if saved:
            rows = [[Cell(visible(one["name"]), href=_saved(here, one["query"]))] for one in saved]
            table([Heading("view", align="left")], rows, name="Saved views", key="views")
        else:
            st.caption("None yet. A saved view keeps filters, order and columns under a name.")
        if read_only():
            return
        st.text_input("Name of this view", key="view-name", max_chars=100)

        def save() -> None:
            here.annotations.save_view(st.session_state["view-name"], here.view.url("")[1:])
            st.session_state["view-name"] = ""

        st.button("Save this view", on_click=attempt, args=(save,))
        if saved:
            gone = st.selectbox(
                "Remove",
                [one["name"] for one in saved],
                index=None,
                key="view-gone",
                placeholder="a saved view",
            )

            def remove() -> None:
                here.annotations.remove_view(str(gone))

            st.button("Remove the view", disabled=gone is None, on_click=attempt, args=(remove,))


def _saved(here: Here, query: str) -> str:
    """A link to a saved view; parameters that a view does not have are dropped."""
    params = dict(parse_qsl(query, keep_blank_values=True))
    return View.from_query(params, sae=here.view.sae, columns=SORTABLE).url(PATH)


def _clear(here: Here) -> None:
    st.button("Clear filters", on_click=lambda: here.show(here.view.cleared()), type="tertiary")


def _heading(column: Column, view: View) -> Heading:
    return Heading(
        column.label,
        align="left" if column.kind in ("token", "text") else "right",
        help=column.help,
        href="" if column.name == LABEL else view.sorted_by(column.name).url(PATH),
        sorted=("descending" if view.descending else "ascending") if column.name == view.sort else "",
    )


def _cells(
    row: dict[str, Any], columns: Sequence[Column], here: Here, scales: dict[str, Scale]
) -> list[Cell]:
    feature = int(row["feature"])
    row = {**row, LABEL: here.names.get(feature)}
    marks = [flag for flag in ("dead", "dense") if row[flag]]
    marks += ["bookmarked"] if feature in here.bookmarks else []
    return [
        *(_cell(row[column.name], column.kind, here.view, scales) for column in columns),
        Cell(" ".join(marks), kind="flag"),
    ]


def _cell(value: Any, kind: Kind, view: View, scales: dict[str, Scale]) -> Cell:
    if kind == "token":
        return token_cell(value)
    if kind == "text":
        return text_cell(value)
    if is_absent(value):
        return Cell("")
    exact = value.item() if hasattr(value, "item") else value
    if kind in ("id", "feature"):
        return Cell(str(exact), exact=exact, href=view.url("feature", f=exact))
    if kind == "count":
        return Cell(count(exact), exact=exact)
    if kind == "share":
        return Cell(share(exact), exact=exact)
    if kind == "density":
        low, high = scales["log_density"].low, scales["log_density"].high
        return Cell(
            share(exact), exact=exact, bar=(math.log10(exact) - low) / (high - low) if exact > 0 else None
        )
    return Cell(number(exact), exact=exact, bar=exact / scales["max_act"].high if kind == "size" else None)
