"""SQL: a read-only query of the store. The query is in the URL, but only the person runs it."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import streamlit as st

from saebench.core.csv_text import as_csv
from saebench.core.errors import UserError
from saebench.core.formatting import as_text, is_absent, visible
from saebench.store.query import FeatureStore
from saebench.store.schema import EXTRA_TABLES, SAE_TABLES, TEXT_TABLES, UNIT, Table
from saebench.store.sql_rules import LONGEST_QUERY
from saebench_app.access import refuse_if_read_only
from saebench_app.components.notice import notice
from saebench_app.components.table import Cell, Heading, table
from saebench_app.session import Here
from saebench_app.url import Choice, Query, Text, parameter

PATH = "sql"
TITLE = "SQL"
SECTION = "Tools"
LIMITS = (100, 1000, 10_000)
HEIGHT = 420

EXAMPLES = {
    "Features that promote their own top token":
        "SELECT feature, top_token, logit_top, density\nFROM feature\nWHERE top_token = logit_top\n"
        "ORDER BY n_act DESC",
    "The most frequent tokens, and how many features fire on them":
        "SELECT text, token.n, count(*) AS features\nFROM token JOIN token_feature USING (token)\n"
        "GROUP BY ALL ORDER BY token.n DESC",
    "Activations by position":
        "SELECT pos, count(*) AS activations, avg(value) AS mean\nFROM act\nGROUP BY pos ORDER BY pos",
    "All tables": "SHOW ALL TABLES",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Asked(Query):
    """The parameters of this page."""

    sql: str = parameter("", Text(), name="query")
    rows: int = parameter(LIMITS[1], Choice(LIMITS))


def show(here: Here) -> None:
    asked = here.read(Asked)
    st.title("SQL")
    refuse_if_read_only("SQL queries")
    left, right = st.columns([13, 7], gap="medium")
    with left:
        _ask(here, asked)
        if not asked.sql.strip():
            notice("Enter a query, or use one of the examples.", key="empty")
        elif asked.sql not in _run_here():
            notice("This query came with the link. Read it, then click Run.", key="waiting")
        else:
            _answer(here, asked)
    with right:
        _examples(here)
        _tables(here)


def _run_here() -> set[str]:
    """The queries that the person has run in this session; a link cannot add to them."""
    queries: set[str] = st.session_state.setdefault("run queries", set())
    return queries


def _ask(here: Here, asked: Asked) -> None:
    st.session_state.update({"query": asked.sql, "rows": asked.rows})

    def limit() -> None:
        here.show(here.view, Asked(sql=st.session_state["query"], rows=st.session_state["rows"]))

    def run() -> None:
        _run_here().add(st.session_state["query"])
        limit()

    st.text_area(
        "Query",
        key="query",
        height=150,
        max_chars=LONGEST_QUERY,
        on_change=run,
        placeholder="SELECT feature, top_token, density FROM feature ORDER BY density DESC",
        help="One SELECT, WITH, DESCRIBE, SHOW or SUMMARIZE statement; Ctrl+Enter runs it. It is read-only "
        "and sees only this store.",
    )
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.button("Run", type="primary", on_click=run)
        st.selectbox("Row limit", LIMITS, key="rows", on_change=limit, width=130, format_func="{:,}".format)


def _answer(here: Here, asked: Asked) -> None:
    try:
        with st.spinner("Running", show_time=True):
            answer = _answer_of(here.store, asked.sql, asked.rows)
    except UserError as error:
        sentence = str(error)
        notice(f"{sentence[:1].upper()}{sentence[1:].rstrip('.')}.", key="refused", kind="error")
        return
    more = answer.attrs.get("more", False)
    rows = f"The first {len(answer):,} rows; there are more." if more else _counted(len(answer))
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.caption(rows, width="content")
        st.download_button(
            "CSV",
            lambda: as_csv(answer),
            file_name="answer.csv",
            mime="text/csv",
            on_click="ignore",
            icon=":material/download:",
            type="tertiary",
        )
    st.dataframe(
        _shown(answer), hide_index=True, height=min(HEIGHT, 40 + 35 * max(len(answer), 1)), key="answer"
    )


@st.cache_data(
    max_entries=8,
    show_spinner=False,
    hash_funcs={FeatureStore: lambda store: (str(store.path), store.sae, store.generation)},
)
def _answer_of(store: FeatureStore, query: str, rows: int) -> pd.DataFrame:
    refuse_if_read_only("SQL queries")
    return store.sql(query, limit=rows)


def _counted(n: int) -> str:
    return "0 rows." if n == 0 else f"{n:,} row{'' if n == 1 else 's'}."


def _shown(answer: pd.DataFrame) -> pd.DataFrame:
    """What the browser's table can show: visible texts, and lists and bytes as text."""
    shown = answer.copy()
    shown.columns = _distinct([visible(str(name)) for name in answer.columns])
    for name in shown.columns:
        if not (pd.api.types.is_numeric_dtype(shown[name]) or pd.api.types.is_bool_dtype(shown[name])):
            shown[name] = [None if is_absent(value) else visible(as_text(value)) for value in shown[name]]
    return shown


def _distinct(names: list[str]) -> list[str]:
    """SQL may give two columns one name; a table of the browser may not."""
    seen: dict[str, int] = {}
    made = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        made.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return made


def _examples(here: Here) -> None:
    st.subheader("Examples")
    headings = [Heading("query", align="left")]
    rows = [
        [Cell(name, href=here.view.url(PATH, query=query), kind="sentence")]
        for name, query in EXAMPLES.items()
    ]
    table(headings, rows, name="Examples", key="examples")


def _tables(here: Here) -> None:
    st.subheader(
        "Tables",
        help="Tables of the SAE that is shown are used by their names; sae1.feature, sae2.feature, ... are "
        "those of each SAE, in the order of the Store page.",
    )
    there = [one for one in _all_tables() if one.name in here.store.tables and one.name != "meta"]
    chosen = st.selectbox(
        "Table", there, format_func=lambda one: one.name, key="about", label_visibility="collapsed"
    )
    if chosen is not None:
        headings = [
            Heading("column", align="left"),
            Heading("type", align="left"),
            Heading("meaning", align="left"),
        ]
        rows = [
            [Cell(c.name, kind="token"), Cell(c.type), Cell(c.help, kind="sentence")] for c in chosen.columns
        ]
        table(headings, rows, name=f"Columns of {chosen.name}", key="columns", height="26rem")


def _all_tables() -> list[Table]:
    extras = [one for tables in EXTRA_TABLES.values() for one in tables.values()]
    return [*SAE_TABLES.values(), *TEXT_TABLES.values(), UNIT, *extras]
