"""Explain: what is explained, by whom and how well; what failed and why; and more of it."""

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
from saebench_app.view import whole
from saebench_app.work import Task, work_on

PATH = "explain"
TITLE = "Explain"
SECTION = "Work"
PER_PAGE = 50
LIMITS = {100: "the 100 most frequent", 1000: "the 1,000 most frequent", 0: "all that fire"}
STATUS = {
    "ok": "explained", "few": "fires too seldom to tell", "failed": "the question failed",
    "refused": "the model refused", "unparsed": "the answer could not be read",
}  # fmt: skip
COLUMNS = {
    "feature": Heading("feature", align="left"),
    "text": Heading("explanation", align="left"),
    "score": Heading("score", help="F1 of a rule, or balanced accuracy in detection, on held-out documents"),
    "ci_lo": Heading("from", help="2.5% quantile of the score over resampled documents"),
    "ci_hi": Heading("to", help="97.5% quantile of the score over resampled documents"),
    "precision": Heading("precision", help="of the places where it should fire, the share where it does"),
    "recall": Heading("recall", help="of the places where it fires, the share where it should"),
    "n_test": Heading("firings", help="in the documents on which it was scored"),
}


@dataclass(frozen=True)
class Asked:
    """What this page's own part of the URL says: whose explanations, in which order."""

    who: str = ""
    by: str = "score"
    up: bool = False
    at: int = 1

    @classmethod
    def read(cls) -> Asked:
        params = st.query_params
        by = params.get("by", "score")
        return cls(
            params.get("who", ""), by if by in COLUMNS else "score", params.get("up") == "1",
            max(whole(params.get("at")) or 1, 1),
        )  # fmt: skip

    def written(self) -> dict[str, int | str]:
        own: dict[str, int | str] = {
            "who": self.who,
            "by": "" if self.by == "score" else self.by,
            "up": int(self.up),
        }
        own["at"] = self.at if self.at > 1 else 0
        return {name: value for name, value in own.items() if value}

    def but(self, **changes: Any) -> dict[str, int | str]:
        """The same with changes, as ``written`` gives it."""
        return replace(self, **changes).written()

    def sorted_by(self, column: str) -> Asked:
        up = not self.up if column == self.by else column in ("feature", "text")
        return replace(self, by=column, up=up, at=1)


def show(here: Here) -> None:
    st.title("Explain")
    asked, makers = Asked.read(), here.store.explained_by()
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
            "Explained by", names, key="who", required=True, format_func=visible,
            on_change=lambda: here.show(here.view, **asked.but(who=st.session_state["who"], at=1)),
        )  # fmt: skip
    scores = here.store.all_explanation_scores(maker["provider"], maker["model"])
    statistics(_statistics(here, maker, scores), key="explained")
    left, right = st.columns([11, 9], gap="medium")
    with left:
        st.subheader(
            "Scores",
            help="On documents that explanations were not made from. Dotted: the best single token, and the "
            "rule of another feature.",
        )
        if len(scores):
            means = ", ".join(
                f"{name} {number(v)}" for name, v in scores.groupby("scorer")["value"].mean().items()
            )
            figure = figures.score_distribution(scores)
            plot(figure, key="scores", alt=f"Distribution of the scores; means: {means}", height=260)
        else:
            notice("None of them has a score.", key="no-scores")
    with right:
        st.subheader("What became of each feature")
        outcomes = here.store.explanation_outcomes(maker["provider"], maker["model"])
        _outcomes(here, outcomes)


def _statistics(here: Here, maker: dict[str, Any], scores: pd.DataFrame) -> list[Statistic]:
    total = here.store.info()["d_sae"]
    mean = {name: float(value) for name, value in scores.groupby("scorer")["value"].mean().items()}
    own = mean.get("rule", mean.get("detection"))
    tiles = [
        Statistic("Provider", visible(_name(maker)), visible(str(maker["prompt"] or ""))),
        Statistic("Explained", count(maker["n_ok"]), f"of {count(maker['n'])} tried", int(maker["n_ok"])),
        Statistic(
            "Of the SAE", share(maker["n_ok"] / total), f"{count(total)} features", maker["n_ok"] / total
        ),
        Statistic("Mean score", number(own), "F1" if "rule" in mean else "balanced accuracy", own),
    ]
    for name, note in (("best token", "one token alone"), ("shuffled", "another feature's rule")):
        if name in mean:
            tiles.append(
                Statistic(name.capitalize(), number(mean[name]), note, mean[name], "mean, to compare with")
            )
    if not is_absent(maker["tokens"]) and maker["tokens"]:
        tiles.append(
            Statistic("Tokens", count(maker["tokens"]), "of the language model", int(maker["tokens"]))
        )
    return tiles


def _outcomes(here: Here, outcomes: pd.DataFrame) -> None:
    headings = [
        Heading("feature", align="left", help="one of them"), Heading("features"),
        Heading("what", align="left"), Heading("why", align="left"),
    ]  # fmt: skip
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
    """Rules are found by a process of ours; language models need keys and money, so the command is shown."""
    store, sae = here.store.path, here.store.sae
    st.subheader("Explain more")
    with st.container(horizontal=True, vertical_alignment="bottom"):
        limit = st.selectbox(
            "By rules, without a model", list(LIMITS), key="limit", format_func=LIMITS.__getitem__, width=260
        )
    task = Task("explain", {"store": str(store), "sae": sae, "limit": limit or None}, (str(store), sae))
    work = work_on(task)
    made = None if work is None else work.result().get("generation")
    done = "" if made is None else f"The explanations are in generation {made} of the store."
    working(task, "Find rules", note="a stopped search continues where it stopped", done=done)
    if made is not None and made > here.store.generation:
        st.button(f"Show generation {made} here", on_click=move_to_newest, type="primary")
    with st.expander("Ask a language model"):
        st.code(
            f"saebench explain {store} --sae {sae} --provider hf --model smollm2 --limit 20\n"
            f"saebench explain {store} --sae {sae} --provider openai --base-url http://127.0.0.1:8000/v1 "
            "--model NAME --limit 20 --budget 2e6",
            language="text", wrap_lines=True,
        )  # fmt: skip
        st.caption("The key is read from OPENAI_API_KEY where the command runs; it never comes to this page.")


def _list(here: Here, asked: Asked, maker: dict[str, Any]) -> None:
    st.subheader("Explanations")
    last = max(1, math.ceil(maker["n"] / PER_PAGE))
    page = min(asked.at, last)
    rows = here.store.all_explanations(
        maker["provider"], maker["model"], order_by=asked.by, descending=not asked.up, limit=PER_PAGE,
        offset=(page - 1) * PER_PAGE,
    )  # fmt: skip
    headings = [
        replace(
            heading, href=here.view.url(PATH, **asked.sorted_by(name).written()),
            sorted=("ascending" if asked.up else "descending") if name == asked.by else "",
        )
        for name, heading in COLUMNS.items()
    ]  # fmt: skip
    table(headings, [_explanation(here, row) for row in rows.to_dict("records")], name="Explanations",
          key="explanations", height="30rem")  # fmt: skip
    if last > 1:
        st.session_state["at"] = page
        st.pagination(
            last,
            key="at",
            on_change=lambda: here.show(here.view, **asked.but(at=st.session_state["at"])),
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
