"""Plotly figures of the results of the Python API, in one style (plot_style.py)."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.analysis.decoder_scatter import MOST_POINTS as MOST_POINTS
from saebench.analysis.decoder_scatter import decoder_scatter
from saebench.analysis.plot_style import (
    COLD,
    HEAT,
    HOT,
    KINDS,
    TEXT,
    counts,
    note,
    require_columns,
    styled,
    token_label,
)
from saebench.core.errors import UserError
from saebench.runs.metrics_log import read_metrics

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from saebench.analysis.interventions import Steering
    from saebench.analysis.matching import Matching

__all__ = [
    "decoder_scatter",
    "density_histogram",
    "histogram",
    "matching_similarity",
    "prompt_heatmap",
    "score_distribution",
    "steering_curve",
    "training_curves",
]

DENSITY_BINS = 60
SIMILARITY_BINS = 50
SCORE_STEPS = 200
SCORERS = ("rule", "detection", "fuzzing", "best token", "shuffled")
BASELINES = ("best token", "shuffled")
MOST_TOKENS = 512
MEASURES = ("fvu", "l0", "dead")
PANELS = 3
EFFECTS = {"kl": "KL(clean || steered), nats", "difference": "log-probability of the text, change in nats"}


def histogram(bins: pd.DataFrame) -> go.Figure:
    """Histogram of the activations of one feature, with counts on a logarithmic axis.

    >>> alive = store.features(flags={"dead": False}, limit=1)
    >>> figure = sb.figures.histogram(store.histogram(alive["feature"][0]))
    >>> bool(figure.data[0].y.sum() == alive["n_act"][0])
    True

    Args:
        bins: columns lo, hi, count, as `FeatureStore.histogram` returns them.
    """
    import plotly.graph_objects as go

    require_columns(bins, "bins", "what store.histogram(feature) gives", "lo", "hi", "count")
    lo, hi, count = (bins[name].to_numpy() for name in ("lo", "hi", "count"))
    bars = go.Bar(
        x=(lo + hi) / 2, y=count, width=hi - lo, marker={"color": HOT, "line": {"width": 0}},
        customdata=bins[["lo", "hi"]].to_numpy(),
        hovertemplate="%{y:,} tokens<br>%{customdata[0]:.3g} to %{customdata[1]:.3g}<extra></extra>",
    )  # fmt: skip
    figure = styled(go.Figure(bars), "activation", "tokens (log)")
    return figure.update_layout(bargap=0, yaxis=counts(count))


def density_histogram(features: pd.DataFrame | Mapping[str, pd.DataFrame]) -> go.Figure:
    """Histogram of activation density: the number of latents by the fraction of tokens on which they fire.

    Given several SAEs by name, it shows one line per SAE with the fraction of its latents in each bin.

    >>> figure = sb.figures.density_histogram(store.features())
    >>> bool(figure.data[0].y.sum() == (store.features()["n_act"] > 0).sum())
    True
    >>> len(sb.figures.density_histogram({"one": store.features(), "same": store.features()}).data)
    2

    Args:
        features: a table with the column density, as `FeatureStore.features` returns it. Latents that never
            fire are not in a bar; a note gives their number.
    """
    import numpy as np
    import plotly.graph_objects as go

    several = isinstance(features, Mapping)
    named = features if isinstance(features, Mapping) else {"": features}
    for frame in named.values():
        require_columns(frame, "features", "what store.features() gives", "density")
    densities = {name: frame["density"].to_numpy(dtype="float64") for name, frame in named.items()}
    logs = {name: np.log10(density[density > 0]) for name, density in densities.items()}
    together = np.concatenate(list(logs.values())) if logs else np.empty(0)
    edges = np.histogram_bin_edges(
        together, DENSITY_BINS if len(together) else 1, None if len(together) else (-1, 0)
    )
    figure = go.Figure()
    limits = 10 ** np.stack([edges[:-1], edges[1:]], axis=1)
    for (name, log), kind in zip(logs.items(), itertools.cycle(KINDS), strict=False):
        count = np.histogram(log, edges)[0]
        if several:
            shown = html.escape(name)
            figure.add_trace(go.Scatter(
                x=(edges[1:] + edges[:-1]) / 2, y=count / max(len(densities[name]), 1), name=shown,
                mode="lines", line={"color": kind, "shape": "hvh", "width": 1.5}, customdata=limits,
                hovertemplate="%{y:.2%} of the latents<br>fire on %{customdata[0]:.2%} to "
                "%{customdata[1]:.2%}<extra>" + shown + "</extra>",
            ))  # fmt: skip
        else:
            figure.add_trace(go.Bar(
                x=(edges[1:] + edges[:-1]) / 2, y=count, width=np.diff(edges),
                marker={"color": HOT, "line": {"width": 0}}, customdata=limits,
                hovertemplate="%{y:,} latents<br>fire on %{customdata[0]:.2%} to %{customdata[1]:.2%}"
                "<extra></extra>",
            ))  # fmt: skip
    styled(figure, "activation density", "fraction of latents" if several else "latents")
    ticks = range(math.floor(edges[0]), math.ceil(edges[-1]) + 1)
    axis = {"tickvals": list(ticks), "ticktext": [f"{100 * 10.0**tick:g}%" for tick in ticks]}
    n_dead = 0 if several else int((densities[""] == 0).sum())
    if n_dead:
        note(figure, f"{n_dead:,} of {len(densities['']):,} never fire")
    if several:
        figure.update_layout(showlegend=True, yaxis={"tickformat": ".0%", "rangemode": "tozero"})
    return figure.update_layout(bargap=0, xaxis=axis)


def score_distribution(scores: pd.DataFrame) -> go.Figure:
    """Distribution of explanation scores: per scorer, the fraction of features with at least each score.

    >>> import pandas as pd
    >>> scores = pd.DataFrame({"scorer": ["rule", "rule", "shuffled"], "value": [0.9, 0.4, 0.0]})
    >>> rule, shuffled = sb.figures.score_distribution(scores).data
    >>> rule.name, float(rule.y[0]), float(rule.y[-1]), shuffled.name
    ('rule', 1.0, 0.0, 'shuffled')

    Args:
        scores: columns scorer and value (from 0 to 1), as `FeatureStore.all_explanation_scores` returns them.
    """
    import numpy as np
    import plotly.graph_objects as go

    require_columns(scores, "scores", "what store.all_explanation_scores(provider) gives", "scorer", "value")
    figure, at = go.Figure(), np.linspace(0, 1, SCORE_STEPS + 1)
    known = [name for name in SCORERS if (scores["scorer"] == name).any()]
    known += sorted(set(scores["scorer"]) - set(SCORERS))
    for name, kind in zip(known, itertools.cycle((HOT, *KINDS)), strict=False):
        values = np.sort(scores.loc[scores["scorer"] == name, "value"].to_numpy(dtype="float64"))
        above = len(values) - np.searchsorted(values, at)
        shown = html.escape(name)
        figure.add_trace(go.Scatter(
            x=at, y=above / max(len(values), 1), name=shown, mode="lines", customdata=above,
            line={"color": kind, "dash": "dot" if name in BASELINES else "solid"},
            hovertemplate="%{customdata:,} features have %{x:.2f} or more<extra>" + shown + "</extra>",
        ))  # fmt: skip
    styled(figure, "score", "features with at least this score")
    return figure.update_layout(
        showlegend=True, xaxis={"range": [0, 1]}, yaxis={"tickformat": ".0%", "range": [0, 1.02]}
    )


def prompt_heatmap(found: pd.DataFrame, top: int = 20, *, keep_first: bool = False) -> go.Figure:
    """Heatmap of the activations in a prompt: one row per latent, one column per token.

    >>> figure = sb.figures.prompt_heatmap(sb.features_of("The Congress", run, model), top=5)
    >>> figure.data[0].z.shape[0] <= 5
    True

    Args:
        found: columns pos, token, feature, value, first, as `features_of` returns them (without ``top``).
        top: the number of latents to show, those with the largest values.
        keep_first: include position 0, whose activations are much larger in most models.

    Raises:
        UserError: missing columns, nothing to show, or more than 512 tokens.
    """
    import plotly.graph_objects as go

    require_columns(
        found, "found", "what features_of(text, ...) gives", "pos", "token", "feature", "value", "first"
    )
    if top < 1:
        raise UserError(f"top is {top}; it must be at least 1")
    shown = found if keep_first else found[~found["first"]]
    if shown.empty:
        raise UserError(
            "found has no latent that fires after position 0; give keep_first=True or a longer text"
        )
    columns = shown.drop_duplicates("pos").set_index("pos")["token"].sort_index()
    if len(columns) > MOST_TOKENS:
        raise UserError(f"found has {len(columns):,} tokens; give at most {MOST_TOKENS}")
    largest = shown.groupby("feature")["value"].max()
    rows = largest.sort_values(kind="stable", ascending=False).index[:top]
    values = shown.pivot_table(index="feature", columns="pos", values="value", aggfunc="sum", fill_value=0.0)
    values = values.loc[rows, columns.index]
    names = [token_label(token) for token in columns]
    heat = go.Heatmap(
        z=values.to_numpy(), x=list(range(len(columns))), y=[f"{feature}" for feature in rows],
        colorscale=HEAT, zmin=min(0.0, float(values.to_numpy().min())), xgap=1, ygap=1,
        customdata=[[[int(pos), name] for pos, name in zip(columns.index, names, strict=True)]] * len(rows),
        hovertemplate="feature %{y}<br>%{customdata[1]} at %{customdata[0]}<br>%{z:.4g}<extra></extra>",
        colorbar={"title": {"text": "value"}, "thickness": 12, "outlinewidth": 0},
    )  # fmt: skip
    figure = styled(go.Figure(heat), "", "feature", height=max(220, 60 + 18 * len(rows)))
    return figure.update_layout(
        xaxis={"tickvals": list(range(len(columns))), "ticktext": names, "showgrid": False, "tickangle": -60},
        yaxis={"type": "category", "autorange": "reversed", "showgrid": False},
    )


def matching_similarity(matching: Matching) -> go.Figure:
    """Histogram of the similarities of the pairs of `match`, with its threshold and stability.

    >>> figure = sb.figures.matching_similarity(sb.match(run, run, quiet=True))
    >>> int(figure.data[0].y.sum()) == sb.load(run).d_sae
    True
    """
    import numpy as np
    import plotly.graph_objects as go

    values = matching.pairs["similarity"].to_numpy()
    lowest = -1.0 if len(values) and values.min() < 0 else 0.0
    count, edges = np.histogram(values, bins=SIMILARITY_BINS, range=(lowest, 1.0))
    middle = (edges[1:] + edges[:-1]) / 2
    bars = go.Bar(
        x=middle, y=count, width=np.diff(edges),
        marker={"color": np.where(middle >= matching.threshold, HOT, COLD).tolist(), "line": {"width": 0}},
        hovertemplate="%{y:,} pairs at %{x:.2f}<extra></extra>",
    )  # fmt: skip
    name = "|cos| of the decoder rows" if matching.by == "decoder" else "correlation of the activations"
    figure = styled(go.Figure(bars), name, "pairs")
    figure.add_vline(matching.threshold, line={"color": TEXT, "dash": "dot", "width": 1})
    note(
        figure,
        f"{matching.stability:.1%} at least {matching.threshold:g}, mean {matching.mean_similarity:.3f}",
    )
    return figure.update_layout(bargap=0)


def steering_curve(steering: Steering, measure: str = "kl") -> go.Figure:
    """Effect of each steering strength on the predictions on the prompt: mean and largest over positions.

    >>> found = sb.steer("The Congress", 3, run, model, strength=[0, 4, 8], new_tokens=0)
    >>> sb.figures.steering_curve(found).data[0].x.tolist()
    [0.0, 4.0, 8.0]

    Args:
        steering: the result of `steer` for several strengths.
        measure: 'kl', or 'difference' of the log-probabilities of the tokens of the text.
    """
    import plotly.graph_objects as go

    if measure not in EFFECTS:
        raise UserError(f"measure is {measure!r}; give {' or '.join(map(repr, EFFECTS))}")
    effects = steering.effects
    first = effects.loc[effects["edited"], "pos"].min() if effects["edited"].any() else 0
    reached = effects[effects["pos"] >= first].groupby("strength")[measure]
    largest = (
        reached.max()
        if measure == "kl"
        else reached.agg(lambda v: v.loc[v.abs().idxmax()] if v.notna().any() else math.nan)
    )
    figure = go.Figure()
    for name, line, kind in (("mean", reached.mean(), HOT), ("largest", largest, COLD)):
        figure.add_trace(
            go.Scatter(
                x=line.index.to_numpy(), y=line.to_numpy(), name=name, mode="lines+markers",
                line={"color": kind, "dash": "solid" if name == "mean" else "dot"},
                hovertemplate="strength %{x:g}: %{y:.4g}<extra>" + name + "</extra>",
            )
        )  # fmt: skip
    return styled(figure, "strength", EFFECTS[measure]).update_layout(showlegend=True)


def training_curves(
    runs: str | PathLike[str] | Iterable[str | PathLike[str]] | Mapping[str, pd.DataFrame],
    measures: Sequence[str] = MEASURES,
    *,
    log: bool = False,
) -> go.Figure:
    """Training curves of one or several runs: one panel per measure, one color per run.

    >>> sb.figures.training_curves(run, ["fvu"]).data[0].y[-1] < 1
    True
    >>> sb.figures.training_curves({"mine": store.metrics_wide()}, ["fvu"], log=True).layout.yaxis.type
    'log'

    Args:
        runs: run directories, or a mapping of names to tables with one column per measure, as
            `FeatureStore.metrics_wide` returns them.
        measures: names of measures in metrics.jsonl.
        log: use logarithmic axes for the measures.

    Raises:
        UserError: no run, a run without metrics, or a measure that no run has.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    tables = _metrics_tables(runs)
    if not tables or not measures:
        raise UserError(f"{'measures' if tables else 'runs'} is empty; name at least one")
    known = {str(name): None for _, table in tables for name in table.columns}
    for measure in measures:
        if measure not in known:
            raise UserError(f"{measure!r} is not a measure of these runs; give one of {', '.join(known)}")
    columns = min(len(measures), PANELS)
    rows = -(-len(measures) // columns)
    figure = make_subplots(rows=rows, cols=columns, subplot_titles=list(measures))
    dashes = itertools.cycle(["solid"] * len(KINDS) + ["dot"] * len(KINDS) + ["dash"] * len(KINDS))
    for at, ((title, table), kind, dash) in enumerate(
        zip(tables, itertools.cycle(KINDS), dashes, strict=False)
    ):
        name = html.escape(title)
        for i, measure in enumerate(measures):
            x_axis = "tokens" if "tokens" in table else "step"
            points = table[[x_axis, measure]].dropna() if measure in table else table.iloc[:0]
            figure.add_trace(
                go.Scatter(
                    x=points[x_axis].tolist() if len(points) else [],
                    y=points[measure].tolist() if len(points) else [], name=name, legendgroup=f"{at}",
                    showlegend=i == 0, mode="lines", line={"color": kind, "dash": dash, "width": 1.5},
                    hovertemplate="%{x:,} " + x_axis + ": %{y:.4g}<extra>" + name + "</extra>",
                ),
                row=i // columns + 1, col=i % columns + 1,
            )  # fmt: skip
    figure = styled(figure, None, None, height=320 if rows == 1 else 250 * rows)
    figure.update_xaxes(title={"text": "tokens"}, row=rows)
    if log:
        figure.update_yaxes(type="log")
    return figure.update_layout(showlegend=len(tables) > 1)


def _metrics_tables(runs: Any) -> list[tuple[str, pd.DataFrame]]:
    """Title and table of metrics of each run; two run directories can have the same title."""
    if isinstance(runs, Mapping):
        return list(runs.items())
    folders = [Path(runs)] if isinstance(runs, str | PathLike) else [Path(run) for run in runs]
    return [(folder.resolve().name, read_metrics(folder)) for folder in dict.fromkeys(folders)]
