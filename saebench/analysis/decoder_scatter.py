"""decoder_scatter: the map of decoder directions as points, or as a grid of cells when there are many."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from saebench.analysis.plot_style import KINDS, SCALE, require_columns, styled, token_label
from saebench.core.deprecation import renamed_arguments
from saebench.core.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

MOST_POINTS = 200_000
"""The largest number of points drawn individually; larger maps are drawn as a grid of cells."""
MAP_CELLS = 160


@renamed_arguments(colour="color")
def decoder_scatter(
    points: pd.DataFrame, color: str = "cluster", features: pd.DataFrame | None = None
) -> go.Figure:
    """Scatter plot of `decoder_map`: one point per latent, colored by its cluster or by a number.

    >>> points = sb.decoder_map(run, n_clusters=3)
    >>> figure = sb.figures.decoder_scatter(points, "density", store.features())
    >>> len(figure.data[0].x) == len(points)
    True

    Args:
        points: columns feature, x, y, cluster, as `decoder_map` returns them.
        color: 'cluster', or a numeric column of ``points`` or ``features``; density is shown as its
            logarithm.
        features: a table as `FeatureStore.features` returns it; its top_token is shown with each point.

    The customdata of a point is its feature. With more than 200,000 points the figure shows a grid instead:
    the number of points in each cell, or the mean of their numbers.
    """
    import numpy as np
    import plotly.graph_objects as go

    require_columns(points, "points", "what decoder_map(sae) gives", "feature", "x", "y", "cluster")
    if features is not None:
        require_columns(features, "features", "what store.features() gives", "feature")
        more = features[[name for name in features if name == "feature" or name not in points]]
        points = points.merge(more, on="feature", how="left")
    if color not in points or not np.issubdtype(points[color].dtype, np.number):
        numbers = [str(name) for name in points.select_dtypes("number") if name not in ("feature", "x", "y")]
        raise UserError(f"color is {color!r}; give one of {', '.join(numbers)}")
    if len(points) > MOST_POINTS:
        return _map_cells(points, color)
    token = [
        token_label(text) if isinstance(text, str) else ""
        for text in points.get("top_token", [""] * len(points))
    ]
    points = points.assign(
        _hover=[f"feature {f}<br>{t}" for f, t in zip(points["feature"], token, strict=True)]
    )
    common = {"mode": "markers", "hovertemplate": "%{text}<extra></extra>"}
    figure = go.Figure()
    if color == "cluster":
        for (cluster, group), kind in zip(points.groupby("cluster"), itertools.cycle(KINDS), strict=False):
            figure.add_trace(
                go.Scattergl(x=group["x"], y=group["y"], text=group["_hover"], name=f"{cluster}",
                             customdata=group["feature"].tolist(),
                             marker={"color": kind, "size": 5, "opacity": 0.75}, **common)
            )  # fmt: skip
        figure.update_layout(legend={"title": {"text": "cluster"}, "itemsizing": "constant"})
    else:
        values, name = points[color].to_numpy(dtype="float64"), color
        if color == "density":
            values, name = np.log10(np.where(values > 0, values, np.nan)), "log10 density"
        bar = {"title": {"text": name}, "thickness": 12, "outlinewidth": 0}
        marker = {"color": values, "colorscale": SCALE, "size": 5, "opacity": 0.8, "colorbar": bar}
        figure.add_trace(
            go.Scattergl(x=points["x"], y=points["y"], text=points["_hover"],
                         customdata=points["feature"].tolist(), marker=marker, **common)
        )  # fmt: skip
    return _without_axes(figure).update_layout(showlegend=color == "cluster")


def _map_cells(points: pd.DataFrame, color: str) -> go.Figure:
    """The map as a grid: the number of points in each cell, or the mean of their numbers."""
    import numpy as np
    import plotly.graph_objects as go

    x, y = (points[name].to_numpy(dtype="float64") for name in ("x", "y"))
    count, x_edges, y_edges = np.histogram2d(x, y, MAP_CELLS)
    with np.errstate(divide="ignore", invalid="ignore"):
        if color == "cluster":
            shown, name = np.log10(count), "log10 latents"
        else:
            values = points[color].to_numpy(dtype="float64")
            known = np.isfinite(values)
            cells = (x_edges, y_edges)
            total = np.histogram2d(x[known], y[known], cells, weights=values[known])[0]
            shown = total / np.histogram2d(x[known], y[known], cells)[0]
            name = color
            if color == "density":
                shown, name = np.log10(shown), "log10 density"
    heat = go.Heatmap(
        x=(x_edges[1:] + x_edges[:-1]) / 2, y=(y_edges[1:] + y_edges[:-1]) / 2,
        z=np.where((count > 0) & np.isfinite(shown), shown, np.nan).T, colorscale=SCALE, customdata=count.T,
        hovertemplate="%{customdata:,} latents<br>" + name + " %{z:.3g}<extra></extra>", hoverongaps=False,
        colorbar={"title": {"text": name}, "thickness": 12, "outlinewidth": 0},
    )  # fmt: skip
    return _without_axes(go.Figure(heat))


def _without_axes(figure: go.Figure) -> go.Figure:
    """The style of a map: no axes, equal scales."""
    bare = {"showgrid": False, "zeroline": False, "showticklabels": False, "showline": False}
    return styled(figure, "", "", height=520).update_layout(
        xaxis=bare, yaxis={**bare, "scaleanchor": "x", "scaleratio": 1}
    )
