"""Explain: the explanations of an SAE with their scores and failures, and a job that makes more."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import streamlit as st

from saebench.analysis import figures
from saebench.core.formatting import count, is_absent, number, share, visible
from saebench_app.components.notice import notice
from saebench_app.components.plot import plot
from saebench_app.components.statistics import Statistic, statistics
from saebench_app.components.table import Cell, Heading, table
from saebench_app.components.working import working
from saebench_app.session import Here, move_to_newest
from saebench_app.url import Choice, Flag, Query, Text, Whole, parameter
from saebench_app.work import Task, work_on

PATH = "explain"
TITLE = "Explain"
SECTION = "Tools"
PER_PAGE = 50
LIMITS = {
    100: "the 100 most frequent features",
    1000: "the 1,000 most frequent features",
    0: "all features that fire",
}
STATUS = {
    "ok": "explained",
    "few": "too few activations",
    "failed": "the request failed",
    "refused": "the model refused",
    "unparsed": "the answer could not be parsed",
}
COLUMNS = {
    "feature": Heading("feature", align="left"),
    "text": Heading("explanation", align="left"),
    "score": Heading("score", help="F1 of a rule, or balanced accuracy in detection, on held-out documents"),
    "ci_lo": Heading("from", help="2.5% quantile of the score over resampled documents"),
    "ci_hi": Heading("to", help="97.5% quantile of the score over resampled documents"),
    "precision": Heading(
        "precision", help="share of the tokens it predicts as active on which the feature fires"
    ),
    "recall": Heading("recall", help="share of the feature's activations that it predicts"),
    "n_test": Heading("activations", help="in the documents that it was scored on"),
}


@dataclass(frozen=True, kw_only=True)
class Asked(Query):
    """The parameters of this page: whose explanations are listed, and in which order."""

    who: str = parameter("", Text())
    by: str = parameter("score", Choice(tuple(COLUMNS)))
    up: bool = parameter(False, Flag())
    """Whether the order is ascending."""
    at: int = parameter(1, Whole(1))

    def sorted_by(self, column: str) -> Asked:
        up = not self.up if column == self.by else column in ("feature", "text")
        return replace(self, by=column, up=up, at=1)


def show(here: Here) -> None:
    st.title("Explain")
    asked, makers = here.read(Asked), here.store.explained_by()
    if len(makers):
        names = [_name(row) for row in makers.to_dict("records")]
        who = asked.who if asked.who in names else names[0]
        maker = makers.to_dict("records")[names.index(who)]
        _overview(here, asked, names, who, maker)
    else:
        notice(f"No feature of {here.store.sae} is explained yet. Begin below.", key="empty")
    _begin(here)
    if len(makers):
        _list(here, asked, maker)


def _name(maker: dict[str, Any]) -> str:
    return f"{maker['provider']}:{maker['model']}" if maker["model"] else str(maker["provider"])


def _overview(here: Here, asked: Asked, names: list[str], who: str, maker: dict[str, Any]) -> None:
    if len(names) > 1:
        st.session_state["who"] = who
        st.segmented_control(
            "Explainer",
            names,
            key="who",
            required=True,
            format_func=visible,
            on_change=lambda: here.show(here.view, replace(asked, who=st.session_state["who"], at=1)),
        )
    scores = here.store.all_explanation_scores(maker["provider"], maker["model"])
    statistics(_statistics(here, maker, scores), key="explained")
    left, right = st.columns([11, 9], gap="medium")
    with left:
        st.subheader(
            "Scores",
            help="On held-out documents. Dotted: two baselines, the best single token and another feature's "
            "rule.",
        )
        if len(scores):
            means = ", ".join(
                f"{name} {number(v)}" for name, v in scores.groupby("scorer")["value"].mean().items()
            )
            figure = figures.score_distribution(scores)
            plot(figure, key="scores", alt=f"Distribution of the scores; means: {means}", height=260)
        else:
            notice("No explanation has a score.", key="no-scores")
    with right:
        st.subheader("Outcomes")
        outcomes = here.store.explanation_outcomes(maker["provider"], maker["model"])
        _outcomes(here, outcomes)


def _statistics(here: Here, maker: dict[str, Any], scores: pd.DataFrame) -> list[Statistic]:
    total = here.store.info()["d_sae"]
    mean = {name: float(value) for name, value in scores.groupby("scorer")["value"].mean().items()}
    own = mean.get("rule", mean.get("detection"))
    tiles = [
        Statistic("Explainer", visible(_name(maker)), visible(str(maker["prompt"] or ""))),
        Statistic("Explained", count(maker["n_ok"]), f"of {count(maker['n'])} tried", int(maker["n_ok"])),
        Statistic(
            "Coverage", share(maker["n_ok"] / total), f"{count(total)} features", maker["n_ok"] / total
        ),
        Statistic("Mean score", number(own), "F1" if "rule" in mean else "balanced accuracy", own),
    ]
    for name, note in (("best token", "one token alone"), ("shuffled", "another feature's rule")):
        if name in mean:
            tiles.append(
                Statistic(
                    name.capitalize(), number(mean[name]), note, mean[name], "mean score of this baseline"
                )
            )
    if not is_absent(maker["tokens"]) and maker["tokens"]:
        tiles.append(
            Statistic("Tokens", count(maker["tokens"]), "of the language model", int(maker["tokens"]))
        )
    return tiles


def _outcomes(here: Here, outcomes: pd.DataFrame) -> None:
    headings = [
        Heading("feature", align="left", help="an example"),
        Heading("features"),
        Heading("outcome", align="left"),
        Heading("reason", align="left"),
    ]
    rows = [
        [
            Cell(f"e.g. {row['feature']}", href=here.view.url("feature", f=row["feature"])),
            Cell(count(row["n"]), exact=int(row["n"])),
            Cell(STATUS.get(row["status"], row["status"])),
            Cell(visible(row["reason"]) if row["reason"] else "", kind="sentence"),
        ]
        for row in outcomes.to_dict("records")
    ]
    table(headings, rows, name="Outcomes", key="outcomes", height="16rem")


def _begin(here: Here) -> None:
    """Rules are found by a job; language models need keys and money, so their command is shown instead."""
    store, sae = here.store.path, here.store.sae
    st.subheader("Explain more")
    with st.container(horizontal=True, vertical_alignment="bottom"):
        limit = st.selectbox(
            "By rules, without a language model",
            list(LIMITS),
            key="limit",
            format_func=LIMITS.__getitem__,
            width=260,
        )
    task = Task("explain", {"store": str(store), "sae": sae, "limit": limit or None}, (str(store), sae))
    work = work_on(task)
    made = None if work is None else work.result().get("generation")
    done = "" if made is None else f"The explanations are in generation {made} of the store."
    working(task, "Find rules", note="a stopped search continues where it stopped", done=done)
    if made is not None and made > here.store.generation:
        st.button(f"Show generation {made} here", on_click=move_to_newest, type="primary")
    with st.expander("Explain with a language model"):
        st.code(
            f"saebench explain {store} --sae {sae} --provider hf --model smollm2 --limit 20\n"
            f"saebench explain {store} --sae {sae} --provider openai --base-url http://127.0.0.1:8000/v1 "
            "--model NAME --limit 20 --budget 2e6",
            language="text",
            wrap_lines=True,
        )
        st.caption("The command reads the API key from OPENAI_API_KEY; this page never sees it.")


def _list(here: Here, asked: Asked, maker: dict[str, Any]) -> None:
    st.subheader("Explanations")
    last = max(1, math.ceil(maker["n"] / PER_PAGE))
    page = min(asked.at, last)
    rows = here.store.all_explanations(
        maker["provider"],
        maker["model"],
        order_by=asked.by,
        descending=not asked.up,
        limit=PER_PAGE,
        offset=(page - 1) * PER_PAGE,
    )
    headings = [
        replace(
            heading,
            href=here.view.url(PATH, asked.sorted_by(name)),
            sorted=("ascending" if asked.up else "descending") if name == asked.by else "",
        )
        for name, heading in COLUMNS.items()
    ]
    table(
        headings,
        [_explanation(here, row) for row in rows.to_dict("records")],
        name="Explanations",
        key="explanations",
        height="30rem",
    )
    if last > 1:
        st.session_state["at"] = page
        st.pagination(
            last,
            key="at",
            on_change=lambda: here.show(here.view, replace(asked, at=st.session_state["at"])),
        )


def _explanation(here: Here, row: dict[str, Any]) -> list[Cell]:
    text = row["text"] if isinstance(row["text"], str) else STATUS.get(row["status"], row["status"])
    numbers = [
        _number(row[name], bar=name == "score") for name in ("score", "ci_lo", "ci_hi", "precision", "recall")
    ]
    return [
        Cell(str(row["feature"]), exact=int(row["feature"]), href=here.view.url("feature", f=row["feature"])),
        Cell(visible(text), kind="sentence"),
        *numbers,
        Cell(count(row["n_test"]), exact=None if is_absent(row["n_test"]) else int(row["n_test"])),
    ]


def _number(value: Any, *, bar: bool) -> Cell:
    if is_absent(value):
        return Cell("")
    return Cell(number(value), exact=float(value), bar=float(value) if bar else None)
