"""Store: which SAEs it holds, how good they are, over which text, and how to add one."""

from __future__ import annotations

from typing import Any

import streamlit as st

from saebench_app.components.sidebar import quality
from saebench_app.components.statistics import Statistic, statistics
from saebench_app.components.table import Cell, Heading, table
from saebench_app.numbers import count, share
from saebench_app.session import Here, open_session_store
from saebench_app.view import View

PATH = "store"
TITLE = "Store"
SECTION = "Look"


def show(here: Here) -> None:
    info = here.store.info()
    st.title("Store")
    statistics(_extent(info), key="extent")
    st.subheader("SAEs")
    table(HEADINGS, [_row(name) for name in here.store.saes], name="SAEs of this store", key="saes")
    st.subheader("Add an SAE")
    st.code(f"saebench index RUN --cache CACHE --out {here.store.path}", language="text", wrap_lines=True)


def _extent(info: dict[str, Any]) -> list[Statistic]:
    facts = [("Model", info["model"]), ("Hook", info["hook_name"]), ("Text", info["text"])]
    amounts = [("Tokens", "n_tokens"), ("Contexts", "n_contexts"), ("Activations", "n_activations")]
    return [Statistic(name, str(fact)) for name, fact in facts if fact] + [
        Statistic(name, count(info[key]), exact=info[key]) for name, key in amounts if info[key]
    ]


HEADINGS = [
    Heading("name", align="left"),
    Heading("architecture", align="left"),
    Heading("features"),
    Heading("k"),
    Heading("L0", help="latents that fire, a token"),
    Heading("dead"),
    Heading("explained variance"),
    Heading("CE score"),
    Heading("dense", help="share of the latents that fire on more than a tenth of the tokens"),
]


def _row(name: str) -> list[Cell]:
    info = open_session_store(name).info()
    return [
        Cell(name, href=View(sae=name).url("features")),
        Cell(info["sae"]),
        Cell(count(info["d_sae"]), exact=info["d_sae"]),
        Cell(count(info["k"]), exact=info["k"]),
        *(Cell(measure.value, exact=measure.exact) for measure in quality(info)),
        Cell(share(info["n_dense"] / info["d_sae"]), exact=info["n_dense"]),
    ]
