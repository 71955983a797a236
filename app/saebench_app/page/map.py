"""Map: every feature as a point of the plane, by its decoder direction; a selection becomes a list."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import streamlit as st

from saebench.analysis import figures
from saebench.analysis.plot_style import HOT, TEXT
from saebench.core.formatting import count, is_absent, number, share, visible
from saebench.store.query import FeatureStore
from saebench.store.schema import feature_column
from saebench_app.components.notice import notice
from saebench_app.components.table import Cell, Heading, table
from saebench_app.components.working import working
from saebench_app.runs import finished_runs, why_no_run
from saebench_app.session import Here
from saebench_app.url import Choice, Query, parameter
from saebench_app.view import MOST_AMONG
from saebench_app.work import Task, found, weights

PATH = "map"
TITLE = "Map"
SECTION = "Compare"
METHODS = {"pca": "PCA", "umap": "UMAP"}
CLUSTER = "cluster"
LISTED = 100
NUMBERS = ("UINTEGER", "BIGINT", "DOUBLE", "FLOAT")


@dataclass(frozen=True, kw_only=True)
class Projection(Query):
    """The parameters of this page."""

    method: str = parameter("pca", Choice(tuple(METHODS)))
    color: str = parameter(CLUSTER, Choice(), old=["colour"])
    """A number of the features, or their cluster."""


def show(here: Here) -> None:
    colors = [CLUSTER, *_numbers(here.store)]
    projection = here.read(Projection, allowed={"color": colors})
    st.title("Map")
    _controls(here, projection, colors)
    task = map_task(here, projection.method)
    result = None if task is None else found(task)
    if task is None:
        notice(why_no_run(here, "needs the decoder"), key="no-run")
    elif result is None:
        notice(
            "Each point is a feature; features with similar decoder directions are close to each other. The "
            "map of this SAE has not been drawn yet.",
            key="empty",
        )
        working(task, "Draw the map", note=_forecast(here, projection))
    else:
        _plot(here, projection, result.tables["points"])
    _selected(here, projection, None if result is None else result.tables["points"])


def map_task(here: Here, method: str) -> Task | None:
    """The job that makes the map of the SAE that is shown; None when no run is known to make it from."""
    info, runs = here.store.info(), [str(run) for run in finished_runs()]
    task = Task("map", {"runs": runs, "sae": weights(info), "method": method}, (info["sae_hash"], method))
    return task if runs or found(task) is not None else None


def _forecast(here: Here, projection: Projection) -> str:
    n = here.store.info()["d_sae"]
    return f"{n:,} features; " + (
        "a few seconds" if projection.method == "pca" or n < 5_000 else "a few minutes"
    )


def _numbers(store: FeatureStore) -> list[str]:
    """Numeric columns of the feature table, without those that are numbers of features."""
    return [
        name
        for name in store.feature_columns
        if feature_column(name).type in NUMBERS and name not in ("feature", "dec_nn")
    ]


def _controls(here: Here, projection: Projection, colors: list[str]) -> None:
    st.session_state.update({"method": projection.method, "color": projection.color})

    def apply() -> None:
        chosen = Projection(method=st.session_state["method"], color=st.session_state["color"])
        here.show(here.view, chosen)

    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.segmented_control(
            "Projection",
            list(METHODS),
            format_func=METHODS.__getitem__,
            key="method",
            on_change=apply,
            required=True,
            help="PCA shows the two directions of largest variance. UMAP keeps similar directions close to "
            "each other; its large distances have no meaning.",
        )
        st.selectbox(
            "Color by",
            colors,
            key="color",
            on_change=apply,
            width=220,
            format_func=lambda name: name.replace("_", " "),
            help=None if projection.color == CLUSTER else feature_column(projection.color).help,
        )


@st.cache_data(
    max_entries=4,
    show_spinner=False,
    hash_funcs={FeatureStore: lambda store: (str(store.path), store.sae, store.generation)},
)
def _figure(store: FeatureStore, points: pd.DataFrame, color: str) -> Any:
    columns = ["feature", *(["top_token"] if store.has("token") else [])]
    columns += [color] if color != CLUSTER else []
    features = store.features(columns)
    if color != CLUSTER:
        features[color] = features[color].astype("float64")
    return figures.decoder_scatter(points, color, features)


def _plot(here: Here, projection: Projection, points: pd.DataFrame) -> None:
    figure = _figure(here.store, points, projection.color)
    many = len(points) > figures.MOST_POINTS
    figure.update_layout(
        dragmode="pan" if many else "lasso",
        margin={"l": 0, "r": 0, "t": 30, "b": 0},
        legend={"orientation": "h", "y": -0.02, "yanchor": "top"},
        modebar={"bgcolor": "rgba(0, 0, 0, 0)", "color": TEXT, "activecolor": HOT},
    )
    if here.view.among and not many:
        _mark(figure, set(here.view.among))
    by = projection.color.replace("_", " ")
    key = f"map-{here.store.sae}-{projection.method}-{projection.color}"

    def select() -> None:
        chosen = _features(st.session_state[key], points)
        here.show(replace(here.view, among=tuple(chosen[:MOST_AMONG])), projection)

    st.plotly_chart(
        figure,
        key=key,
        on_select="ignore" if many else select,
        selection_mode=("box", "lasso", "points"),
        config={"displaylogo": False, "modeBarButtonsToRemove": ["toImage"], "scrollZoom": True},
        alt=f"Map of {len(points):,} features of {here.store.sae}, colored by {by}",
    )
    st.caption(
        f"More than {figures.MOST_POINTS:,} features: each cell shows the mean of its features."
        if many
        else "Draw around points to list their features. Double-click to clear the selection."
    )


def _mark(figure: Any, chosen: set[int]) -> None:
    """Show the selection of the URL as a selection."""
    for trace in figure.data:
        trace.selectedpoints = [at for at, feature in enumerate(trace.customdata) if int(feature) in chosen]
        trace.unselected = {"marker": {"opacity": 0.12}}


def _features(state: Any, points: pd.DataFrame) -> list[int]:
    """The features of a selection that a browser sent, which may be anything."""
    known = set(points["feature"].tolist())
    chosen = []
    for point in state.get("selection", {}).get("points", []):
        value = point.get("customdata")
        value = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(value, int | float) and value in known:
            chosen.append(int(value))
    return sorted(dict.fromkeys(chosen))


def _selected(here: Here, projection: Projection, points: pd.DataFrame | None) -> None:
    chosen = here.view.among
    if not chosen:
        return
    store = here.store
    columns = ["feature", *(["top_token"] if store.has("token") else []), "density", "max_act", "dec_max_cos"]
    columns += ["explanation"] if "explanation" in store.feature_columns else []
    rows = store.features(columns, among=chosen, order_by="density", descending=True, limit=LISTED)
    with st.container(horizontal=True, vertical_alignment="center"):
        st.subheader(f"{len(chosen):,} selected", width="content")
        st.page_link(here.pages["features"], label="Open in Features", query_params=here.view.query())
        st.button(
            "Clear", type="tertiary", on_click=here.show, args=(replace(here.view, among=()), projection)
        )
    if len(chosen) == MOST_AMONG:
        st.caption(f"Only the first {MOST_AMONG:,}, by number, are kept.")
    clusters = {} if points is None else dict(zip(points["feature"], points["cluster"], strict=True))
    headings = [Heading("feature", align="left"), Heading("cluster")]
    headings += [
        Heading(name.replace("_", " "), align="left" if name in TEXTS else "right") for name in columns[1:]
    ]
    cells = [_row(here, row, columns, clusters) for row in rows.to_dict("records")]
    table(headings, cells, name="Selected features", key="selected", height="24rem")
    if len(chosen) > LISTED:
        st.caption(f"The {LISTED} with the highest density. Open in Features to see all.")


TEXTS = ("top_token", "explanation")


def _row(here: Here, row: dict[str, Any], columns: list[str], clusters: dict[int, int]) -> list[Cell]:
    feature = int(row["feature"])
    cells = [
        Cell(str(feature), exact=feature, href=here.view.url("feature", f=feature)),
        Cell(count(clusters.get(feature))),
    ]
    for name in columns[1:]:
        value = row[name]
        if is_absent(value):
            cells.append(Cell(""))
        elif name == "top_token":
            cells.append(Cell(visible(value, spaces="edges"), kind="token"))
        elif name == "explanation":
            cells.append(Cell(visible(value), kind="sentence"))
        else:
            cells.append(Cell(share(value) if name == "density" else number(value), exact=float(value)))
    return cells
