"""Train: the metrics of finished runs, and of those that are being trained now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import streamlit as st

from saebench.analysis import figures
from saebench.core.errors import UserError
from saebench.core.formatting import count, is_absent, number, visible
from saebench.runs.metrics_log import MetricsLog, read_sessions
from saebench.runs.run import Run
from saebench_app.components.notice import notice
from saebench_app.components.plot import plot
from saebench_app.components.table import Cell, Heading, table
from saebench_app.runs import known_runs
from saebench_app.session import Here, open_session_store
from saebench_app.url import Flag, Names, Query, Texts, parameter

PATH = "train"
TITLE = "Train"
SECTION = "Tools"
SECONDS_BETWEEN_UPDATES = "2s"
DEFAULT_METRICS = ("fvu", "l0", "dead")
NOT_METRICS = ("step", "tokens")
MOST_RUNS = 16


@dataclass(frozen=True, kw_only=True)
class Curves(Query):
    """The parameters of this page: which runs, which metrics, which axis."""

    of: tuple[str, ...] = parameter((), Texts())
    measures: tuple[str, ...] = parameter((), Names())
    log: bool = parameter(False, Flag())


@dataclass(frozen=True)
class Training:
    """One training run: of an SAE of the store, or of a run directory."""

    name: str
    sae: str = ""
    run: Run | None = None


def show(here: Here) -> None:
    st.title("Train")
    known = _known(here)
    st.fragment(_live, run_every=SECONDS_BETWEEN_UPDATES if any(map(_is_running, known)) else None)(
        here, known
    )


def _known(here: Here) -> list[Training]:
    """Run directories, which are read live, then the SAEs of the store that are in none of them."""
    found = [run for run in known_runs() if run.is_training_directory]
    names = [run.path.name for run in found]
    runs = [
        Training(run.path.name if names.count(run.path.name) == 1 else str(run), run=run) for run in found
    ]
    stored = [Training(name, sae=name) for name in here.store.saes if name not in names]
    return runs + stored


def _is_running(training: Training) -> bool:
    return training.run is not None and not training.run.is_finished


def _live(here: Here, known: list[Training]) -> None:
    curves = here.read(Curves)
    metrics: dict[str, pd.DataFrame] = {}
    wanted = [one for one in known if one.name in curves.of] or _default_runs(here, known)
    for training in wanted:
        frame = _metrics(training)
        if frame is not None and len(frame):
            metrics[training.name] = frame
    measures = _measures(metrics)
    chosen = [name for name in curves.measures or DEFAULT_METRICS if name in measures] or measures[:1]
    _controls(here, known, [one.name for one in wanted], measures, chosen, curves)
    if not metrics:
        notice(_why_none(here, wanted), key="waiting")
    else:
        _draw(metrics, chosen, log=curves.log)
    _state(here, wanted, metrics, chosen)
    _sessions(wanted)


def _draw(metrics: dict[str, pd.DataFrame], measures: list[str], *, log: bool) -> None:
    """One chart per metric: side by side where there is room, below each other on a telephone."""
    for first in range(0, len(measures), figures.PANELS):
        row = measures[first : first + figures.PANELS]
        for column, measure in zip(st.columns(figures.PANELS, gap="medium"), row, strict=False):
            with column:
                last = ", ".join(
                    f"{name} {number(frame[measure].iloc[-1])}"
                    for name, frame in metrics.items()
                    if measure in frame
                )
                figure = figures.training_curves(metrics, [measure], log=log)
                figure.update_layout(showlegend=len(metrics) > 1 and measure == measures[0])
                alt = f"{measure} against tokens; at the last step: {last}"
                plot(figure, key=f"curve-{measure}", alt=alt, height=260)


def _why_none(here: Here, wanted: list[Training]) -> str:
    if any(map(_is_running, wanted)):
        return "These runs have not reported a step yet."
    return (
        "The store has no training metrics of these SAEs. To see those of a run, start the explorer as "
        f"saebench explore {here.store.path} --run RUN."
    )


def _default_runs(here: Here, known: list[Training]) -> list[Training]:
    """The runs that are being trained now, else the SAE that is shown, else the first."""
    going_on = [one for one in known if _is_running(one)]
    own = [one for one in known if here.store.sae in (one.name, one.sae)]
    return (going_on or own or known[:1])[:MOST_RUNS]


def _metrics(training: Training) -> pd.DataFrame | None:
    if training.run is None:
        store = open_session_store(training.sae)
        return store.metrics_wide() if store.has("train_metric") else None
    log = _metrics_log(str(training.run))
    try:
        log.update()
    except UserError:
        return None
    return log.frame()


@st.cache_resource(max_entries=64, show_spinner=False)
def _metrics_log(run: str) -> MetricsLog:
    return MetricsLog(run)


def _measures(metrics: dict[str, pd.DataFrame]) -> list[str]:
    names = dict.fromkeys(str(name) for frame in metrics.values() for name in frame.columns)
    return [name for name in names if name not in NOT_METRICS]


def _controls(
    here: Here,
    known: list[Training],
    wanted: list[str],
    measures: list[str],
    chosen: list[str],
    curves: Curves,
) -> None:
    st.session_state.update({"trainings": wanted, "measures": chosen, "log": curves.log})

    def apply() -> None:
        of, chosen_measures = (tuple(st.session_state[name]) for name in ("trainings", "measures"))
        here.show(here.view, Curves(of=of, measures=chosen_measures, log=st.session_state["log"]))

    left, right = st.columns(2)
    left.multiselect(
        "Runs",
        [one.name for one in known],
        key="trainings",
        on_change=apply,
        max_selections=MOST_RUNS,
        format_func=visible,
    )
    right.multiselect("Metrics", measures, key="measures", on_change=apply)
    st.toggle("Log scale", key="log", on_change=apply)


def _state(here: Here, wanted: list[Training], metrics: dict[str, pd.DataFrame], chosen: list[str]) -> None:
    headings = [
        Heading("run", align="left"),
        Heading("state", align="left"),
        Heading("step"),
        Heading("tokens"),
    ]
    headings += [Heading(name) for name in chosen]
    rows = []
    for training in wanted:
        frame = metrics.get(training.name)
        last = {} if frame is None else frame.iloc[-1].to_dict()
        state = "in the store" if training.run is None else "running" if _is_running(training) else "finished"
        rows.append(
            [
                Cell(visible(training.name)),
                Cell(state),
                Cell(count(last.get("step"))),
                Cell(count(last.get("tokens"))),
                *(Cell(number(last.get(name)), exact=_exact(last.get(name))) for name in chosen),
            ]
        )
    st.subheader("Last step")
    table(headings, rows, name="Last step", key="last")


def _exact(value: Any) -> float | None:
    return None if is_absent(value) else float(value)


def _sessions(wanted: list[Training]) -> None:
    """The processes that trained each run: one, unless it was stopped and resumed."""
    rows = []
    for training in wanted:
        for session in read_sessions(training.run) if training.run else []:
            rows.append(
                [
                    Cell(visible(training.name)),
                    Cell(f"{count(session.get('first_step'))} to {count(session.get('last_step'))}"),
                    Cell(f"{number(session.get('seconds'))} s", exact=_exact(session.get("seconds"))),
                    Cell(
                        count(session.get("tokens_per_second")),
                        exact=_exact(session.get("tokens_per_second")),
                    ),
                    Cell(visible(str(session.get("device", "")))),
                    Cell(visible(str(session.get("kernels", "")))),
                ]
            )
    if rows:
        st.subheader("Sessions", help="One row per process that trained the run; a resumed run has several.")
        headings = [
            Heading("run", align="left"),
            Heading("steps"),
            Heading("time"),
            Heading("tokens/s"),
            Heading("device", align="left"),
            Heading("kernels", align="left"),
        ]
        table(headings, rows, name="Sessions", key="sessions")
