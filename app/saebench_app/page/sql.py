"""SQL: a person's own question to the store, read-only; the question is in the URL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import streamlit as st

from saebench.core.errors import UserError
from saebench.core.formatting import visible
from saebench.store.query import FeatureStore
from saebench.store.schema import EXTRA_TABLES, SAE_TABLES, TEXT_TABLES, Table
from saebench.store.sql import LONGEST_QUERY
from saebench_app.components.notice import notice
from saebench_app.components.table import Cell, Heading, table
from saebench_app.session import Here
from saebench_app.view import whole

PATH = "sql"
TITLE = "SQL"
SECTION = "Work"
LIMITS = (100, 1000, 10_000)
HEIGHT = 420

EXAMPLES = {
    "Features that promote what they fire on":
        "SELECT feature, top_token, logit_top, density\nFROM feature\nWHERE top_token = logit_top\n"
        "ORDER BY n_act DESC",
    "The most frequent tokens, and how many features fire on them":
        "SELECT text, token.n, count(*) AS features\nFROM token JOIN token_feature USING (token)\n"
        "GROUP BY ALL ORDER BY token.n DESC",
    "Positions at which most fires":
        "SELECT pos, count(*) AS firings, avg(value) AS mean\nFROM act\nGROUP BY pos ORDER BY pos",
    "Everything that can be asked": "SHOW ALL TABLES",
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """What this page's own part of the URL says."""

    query: str = ""
    rows: int = LIMITS[1]

    @classmethod
    def read(cls) -> Question:
        rows = whole(st.query_params.get("rows"))
        return cls(st.query_params.get("query", ""), rows if rows in LIMITS else LIMITS[1])

    def written(self) -> dict[str, int | str]:
        own: dict[str, int | str] = {"query": self.query} if self.query else {}
        return own | ({"rows": self.rows} if self.rows != LIMITS[1] else {})


def show(here: Here) -> None:
    question = Question.read()
    st.title("SQL")
    left, right = st.columns([13, 7], gap="medium")
    with left:
        _ask(here, question)
        if question.query.strip():
            _answer(here, question)
        else:
            notice("Write a question, or take one of the examples.", key="empty")
    with right:
        _examples(here)
        _tables(here)


def _ask(here: Here, question: Question) -> None:
    st.session_state.update({"query": question.query, "rows": question.rows})

    def run() -> None:
        asked = Question(st.session_state["query"], st.session_state["rows"])
        here.show(here.view, **asked.written())

    st.text_area(
        "Question", key="query", height=150, max_chars=LONGEST_QUERY, on_change=run,
        placeholder="SELECT feature, top_token, density FROM feature ORDER BY density DESC",
        help="One SELECT, WITH, DESCRIBE, SHOW or SUMMARIZE. Ctrl+Enter asks it. Nothing can be written, and "
        "nothing but this store is read.",
    )  # fmt: skip
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.button("Ask", type="primary", on_click=run)
        st.selectbox("Rows at most", LIMITS, key="rows", on_change=run, width=130, format_func="{:,}".format)


def _answer(here: Here, question: Question) -> None:
    try:
        with st.spinner("Asking", show_time=True):
            answer = _asked(here.store, question.query, question.rows)
    except UserError as error:
        sentence = str(error)
        notice(f"{sentence[:1].upper()}{sentence[1:].rstrip('.')}.", key="refused", kind="error")
        return
    more = answer.attrs.get("more", False)
    rows = f"The first {len(answer):,} rows; there are more." if more else _counted(len(answer))
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.caption(rows, width="content")
        st.download_button(
            "CSV", lambda: _csv(answer), file_name="answer.csv", mime="text/csv", on_click="ignore",
            icon=":material/download:", type="tertiary",
        )  # fmt: skip
    st.dataframe(
        _shown(answer), hide_index=True, height=min(HEIGHT, 40 + 35 * max(len(answer), 1)), key="answer"
    )


@st.cache_data(
    max_entries=8, show_spinner=False,
    hash_funcs={FeatureStore: lambda store: (str(store.path), store.sae, store.generation)},
)  # fmt: skip
def _asked(store: FeatureStore, query: str, rows: int) -> pd.DataFrame:
    return store.sql(query, limit=rows)


def _counted(n: int) -> str:
    return "No row." if n == 0 else f"{n:,} row{'' if n == 1 else 's'}."


def _csv(answer: pd.DataFrame) -> bytes:
    return str(answer.to_csv(index=False)).encode("utf-8", "backslashreplace")


def _shown(answer: pd.DataFrame) -> pd.DataFrame:
    """What the browser's table can show: texts with signs for what has no shape, lists and bytes as text."""
    shown = answer.copy()
    shown.columns = _distinct([visible(str(name)) for name in answer.columns])
    for name in shown.columns:
        if not (pd.api.types.is_numeric_dtype(shown[name]) or pd.api.types.is_bool_dtype(shown[name])):
            shown[name] = [None if _is_null(value) else visible(_text(value)) for value in shown[name]]
    return shown


def _distinct(names: list[str]) -> list[str]:
    """SQL may give two columns one name; a table of the browser may not."""
    seen: dict[str, int] = {}
    made = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        made.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return made


def _text(value: Any) -> str:
    if isinstance(value, bytes | bytearray):
        return bytes(value).decode("utf-8", "backslashreplace")
    return value if isinstance(value, str) else str(value.tolist() if hasattr(value, "tolist") else value)


def _is_null(value: Any) -> bool:
    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))


def _examples(here: Here) -> None:
    st.subheader("Examples")
    headings = [Heading("question", align="left")]
    rows = [
        [Cell(name, href=here.view.url(PATH, query=query), kind="sentence")]
        for name, query in EXAMPLES.items()
    ]
    table(headings, rows, name="Examples", key="examples")


def _tables(here: Here) -> None:
    st.subheader(
        "Tables",
        help="Those of the SAE that is shown go by their names; sae1.feature, sae2.feature, ... are those of "
        "the store's SAEs, in the order of the Store page.",
    )
    there = [one for one in _all_tables() if one.name in here.store.tables and one.name != "meta"]
    chosen = st.selectbox(
        "Table", there, format_func=lambda one: one.name, key="about", label_visibility="collapsed"
    )
    if chosen is not None:
        headings = [
            Heading("column", align="left"),
            Heading("type", align="left"),
            Heading("what it is", align="left"),
        ]
        rows = [
            [Cell(c.name, kind="token"), Cell(c.type), Cell(c.help, kind="sentence")] for c in chosen.columns
        ]
        table(headings, rows, name=f"Columns of {chosen.name}", key="columns", height="26rem")


def _all_tables() -> list[Table]:
    extras = [one for tables in EXTRA_TABLES.values() for one in tables.values()]
    return [*SAE_TABLES.values(), *TEXT_TABLES.values(), *extras]
