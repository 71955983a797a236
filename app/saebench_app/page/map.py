"""Map: every feature as a point of the plane, near where its decoder points; a selection becomes a list."""

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
from saebench_app.view import MOST_AMONG
from saebench_app.work import Task, found, weights

PATH = "map"
TITLE = "Map"
SECTION = "Compare"
METHODS = {"pca": "principal axes", "umap": "neighbors (UMAP)"}
LISTED = 100
NUMBERS = ("UINTEGER", "BIGINT", "DOUBLE", "FLOAT")


@dataclass(frozen=True)
class Projection:
    """What this page's own part of the URL says."""

    method: str = "pca"
    color: str = "cluster"

    @classmethod
    def read(cls, colors: list[str]) -> Projection:
        method = st.query_params.get("method", "pca")
        color = st.query_params.get("color", st.query_params.get("colour", "cluster"))
        return cls(method if method in METHODS else "pca", color if color in colors else "cluster")

    def written(self) -> dict[str, int | str]:
        own = {"method": self.method, "color": self.color}
        return {name: value for name, value in own.items() if value != getattr(Projection(), name)}


def show(here: Here) -> None:
    colors = ["cluster", *_numbers(here.store)]
    projection = Projection.read(colors)
    st.title("Map")
    _controls(here, projection, colors)
    task = map_task(here, projection.method)
    result = None if task is None else found(task)
    if task is None:
        notice(why_no_run(here).replace("runs the model", "needs the decoder"), key="no-run")
    elif result is None:
        notice(
            "Points that are near have decoders that point alike. The map of this SAE is not drawn yet.",
            key="empty",
        )
        working(task, "Draw the map", note=_forecast(here, projection))
    else:
        _plot(here, projection, result.tables["points"])
    _selected(here, None if result is None else result.tables["points"])


def map_task(here: Here, method: str) -> Task | None:
    """The work that makes the map of the SAE that is shown; None when no run is known to make it from."""
    info, runs = here.store.info(), [str(run) for run in finished_runs()]
    task = Task("map", {"runs": runs, "sae": weights(info), "method": method}, (info["sae_hash"], method))
    return task if runs or found(task) is not None else None


def _forecast(here: Here, projection: Projection) -> str:
    n = here.store.info()["d_sae"]
    return f"{n:,} features; " + (
        "some seconds" if projection.method == "pca" or n < 5_000 else "some minutes"
    )


def _numbers(store: FeatureStore) -> list[str]:
    """Columns of the feature table that are numbers and no names of features."""
    return [
        name
        for name in store.feature_columns
        if feature_column(name).type in NUMBERS and name not in ("feature", "dec_nn")
    ]


def _controls(here: Here, projection: Projection, colors: list[str]) -> None:
    st.session_state.update({"method": projection.method, "color": projection.color})

    def apply() -> None:
        chosen = Projection(st.session_state["method"], st.session_state["color"])
        here.show(here.view, **chosen.written())

    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.segmented_control(
            "Drawn by", list(METHODS), format_func=METHODS.__getitem__, key="method", on_change=apply,
            required=True,
            help="Principal axes are exact and show little of many directions. UMAP keeps near directions "
            "near; its large distances mean nothing.",
        )  # fmt: skip
        st.selectbox(
            "Colored by", colors, key="color", on_change=apply, width=220,
            format_func=lambda name: name.replace("_", " "),
            help=None if projection.color == "cluster" else feature_column(projection.color).help,
        )  # fmt: skip


@st.cache_data(
    max_entries=4, show_spinner=False,
    hash_funcs={FeatureStore: lambda store: (str(store.path), store.sae, store.generation)},
)  # fmt: skip
def _figure(store: FeatureStore, points: pd.DataFrame, color: str) -> Any:
    columns = ["feature", *(["top_token"] if store.has("token") else [])]
    columns += [color] if color != "cluster" else []
    features = store.features(columns)
    if color != "cluster":
        features[color] = features[color].astype("float64")
    return figures.decoder_scatter(points, color, features)


def _plot(here: Here, projection: Projection, points: pd.DataFrame) -> None:
    figure = _figure(here.store, points, projection.color)
    many = len(points) > figures.MOST_POINTS
    figure.update_layout(
        dragmode="pan" if many else "lasso", margin={"l": 0, "r": 0, "t": 30, "b": 0},
        legend={"orientation": "h", "y": -0.02, "yanchor": "top"},
        modebar={"bgcolor": "rgba(0, 0, 0, 0)", "color": TEXT, "activecolor": HOT},
    )  # fmt: skip
    if here.view.among and not many:
        _mark(figure, set(here.view.among))
    by = projection.color.replace("_", " ")
    key = f"map-{here.store.sae}-{projection.method}-{projection.color}"

    def select() -> None:
        chosen = _features(st.session_state[key], points)
        here.show(replace(here.view, among=tuple(chosen[:MOST_AMONG])), **projection.written())

    st.plotly_chart(
        figure, key=key, on_select="ignore" if many else select, selection_mode=("box", "lasso", "points"),
        config={"displaylogo": False, "modeBarButtonsToRemove": ["toImage"], "scrollZoom": True},
        alt=f"Map of {len(points):,} features of {here.store.sae}, colored by {by}",
    )  # fmt: skip
    st.caption(
        f"More than {figures.MOST_POINTS:,} features: each cell is the mean of those in it."
        if many
        else "Draw around points to list their features; a double click takes the selection away."
    )


def _mark(figure: Any, chosen: set[int]) -> None:
    """Show the selection of the URL as a selection."""
    for trace in figure.data:
        trace.selectedpoints = [at for at, feature in enumerate(trace.customdata) if int(feature) in chosen]
        trace.unselected = {"marker": {"opacity": 0.12}}


def _features(state: Any, points: pd.DataFrame) -> list[int]:
    """The features of a selection, of whatever a browser says they are."""
    known = set(points["feature"].tolist())
    chosen = []
    for point in state.get("selection", {}).get("points", []):
        value = point.get("customdata")
        value = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(value, int | float) and value in known:
            chosen.append(int(value))
    return sorted(dict.fromkeys(chosen))


def _selected(here: Here, points: pd.DataFrame | None) -> None:
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
        st.button("Clear", type="tertiary", on_click=here.show, args=(replace(here.view, among=()),),
                  kwargs=Projection.read(["cluster", *_numbers(store)]).written())  # fmt: skip
    if len(chosen) == MOST_AMONG:
        st.caption(f"The first {MOST_AMONG:,} of them, by number.")
    clusters = {} if points is None else dict(zip(points["feature"], points["cluster"], strict=True))
    headings = [Heading("feature", align="left"), Heading("cluster")]
    headings += [
        Heading(name.replace("_", " "), align="left" if name in TEXTS else "right") for name in columns[1:]
    ]
    cells = [_row(here, row, columns, clusters) for row in rows.to_dict("records")]
    table(headings, cells, name="Selected features", key="selected", height="24rem")
    if len(chosen) > LISTED:
        st.caption(f"The {LISTED} densest; Features has all of them.")


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
