"""Store: which SAEs it holds, how good they are, over which text, whether it is sound, how to add more."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from saebench.analysis import figures
from saebench.core.files import human_bytes
from saebench.core.formatting import count, is_absent, number, share
from saebench.store.annotations import Annotations
from saebench.store.query import FeatureStore
from saebench_app.components.notice import notice
from saebench_app.components.plot import plot
from saebench_app.components.statistics import Statistic, statistics
from saebench_app.components.table import Cell, Heading, table
from saebench_app.components.working import working
from saebench_app.session import Here, open_session_store
from saebench_app.view import View
from saebench_app.work import Task, found

PATH = "store"
TITLE = "Store"
SECTION = "Look"
MOST_OVERLAID = 8
"""SAEs in one density plot: as many as there are colors that everybody can tell apart."""


def show(here: Here) -> None:
    store, info = here.store, here.store.info()
    saes = compared(store)
    st.title("Store")
    statistics(_extent(here, info, saes), key="extent")
    st.subheader("SAEs")
    table(HEADINGS, _rows(here, saes), name="SAEs of this store", key="saes")
    left, right = st.columns([11, 9], gap="medium")
    with left:
        _densities(here, saes)
    with right:
        _health(here)
    _missing(here, info)
    st.subheader("Add an SAE")
    st.code(f"saebench index RUN --cache CACHE --out {store.path}", language="text", wrap_lines=True)


@st.cache_data(
    max_entries=4, show_spinner=False, hash_funcs={FeatureStore: lambda s: (str(s.path), s.generation)}
)
def compared(store: FeatureStore) -> pd.DataFrame:
    """Opens every SAE of the store: once a generation."""
    return store.compare()


def _extent(here: Here, info: dict[str, Any], saes: pd.DataFrame) -> list[Statistic]:
    facts = [("Model", info["model"]), ("Hook", info["hook_name"]), ("Text", info["text"])]
    amounts = [("Tokens", "n_tokens"), ("Contexts", "n_contexts"), ("Documents", "n_documents")]
    size = int(saes["bytes"].sum())
    tiles = [Statistic(name, str(fact)) for name, fact in facts if fact]
    tiles += [
        Statistic(name, count(info.get(key)), exact=info[key]) for name, key in amounts if info.get(key)
    ]
    return [
        *tiles,
        Statistic("Size", human_bytes(size), "without the text", size),
        Statistic(
            "Generation", count(here.store.generation), help="each change of the store makes a new one"
        ),
    ]


HEADINGS = [
    Heading("name", align="left"),
    Heading("architecture", align="left"),
    Heading("features"),
    Heading("k"),
    Heading("L0", help="latents that fire, a token, on the indexed text"),
    Heading("explained variance", help="share of the variance that it reconstructs, on held-out rows"),
    Heading("CE score", help="1: the model reads the reconstruction without loss; 0: as bad as zeros"),
    Heading("dead", help="share of the latents that never fire on the indexed text"),
    Heading("dense", help="share of the latents that fire on more than a tenth of the tokens"),
    Heading("labels", help="features that someone has named"),
    Heading("bookmarks"),
    Heading("comments"),
    Heading("size"),
]


def _rows(here: Here, saes: pd.DataFrame) -> list[list[Cell]]:
    return [_row(here, row) for row in saes.to_dict("records")]


def _row(here: Here, row: dict[str, Any]) -> list[Cell]:
    notes = Annotations(here.store.path, row["sae_hash"])
    written = [len(notes.labels()), len(notes.bookmarks()), len(notes.comments())]
    return [
        Cell(row["name"], href=View(sae=row["name"]).url("features")),
        Cell(row["sae"]),
        Cell(count(row["d_sae"]), exact=row["d_sae"]),
        Cell(count(row["k"])),
        Cell(number(row["l0"]), exact=_exact(row["l0"])),
        Cell(number(row["explained_variance"]), exact=_exact(row["explained_variance"])),
        Cell(number(row["ce_loss_score"]), exact=_exact(row["ce_loss_score"])),
        Cell(share(row["dead"]), exact=_exact(row["dead"])),
        Cell(share(row["dense"]), exact=_exact(row["dense"])),
        *(Cell(count(n), exact=n) for n in written),
        Cell(human_bytes(row["bytes"]), exact=int(row["bytes"])),
    ]


def _exact(value: Any) -> float | None:
    return None if is_absent(value) else float(value)


def _densities(here: Here, saes: pd.DataFrame) -> None:
    st.subheader(
        "How often features fire", help="Each line is an SAE: the share of its features at each density."
    )
    names = saes["name"].tolist()[:MOST_OVERLAID]
    frames = {name: open_session_store(name).features(["density"]) for name in names}
    figure = figures.density_histogram(frames if len(frames) > 1 else frames[names[0]])
    dead = ", ".join(f"{n}: {(frame['density'] == 0).sum():,}" for n, frame in frames.items())
    plot(
        figure,
        key="densities",
        alt=f"Density of the features of {', '.join(names)}; never firing: {dead}",
        height=280,
    )
    if len(saes) > MOST_OVERLAID:
        st.caption(f"The first {MOST_OVERLAID} of {len(saes)} SAEs.")


def _health(here: Here) -> None:
    st.subheader("Health", help="Checksums of all files; every table against the others and the activations.")
    task = Task("check", {"store": str(here.store.path)}, (str(here.store.path),))
    result = found(task)
    if result is not None:
        findings, generation = result.facts["findings"], result.facts["generation"]
        when = f"generation {generation}, checked {result.facts['time'][:16].replace('T', ' ')} UTC"
        if findings:
            n = len(findings)
            notice(
                f"Damaged in {n} place{'' if n == 1 else 's'} ({when}). Run saebench index again.",
                key="health", kind="error",
            )  # fmt: skip
            headings = [Heading("where", align="left"), Heading("what is wrong", align="left")]
            rows = [[Cell(one["where"]), Cell(one["problem"], kind="sentence")] for one in findings]
            table(headings, rows, name="What is damaged", key="findings", height="16rem")
        else:
            notice(f"Nothing wrong was found ({when}).", key="health")
        if generation != here.store.generation:
            notice(f"That was not generation {here.store.generation}, which is shown.", key="health-old")
    else:
        notice("Not checked yet.", key="health")
    working(
        task, "Check again" if result else "Check the store", note="reads every file and recounts the tables"
    )


def _missing(here: Here, info: dict[str, Any]) -> None:
    """What the SAE that is shown lacks, and the command that adds it."""
    rows = [
        [Cell(what, kind="sentence"), Cell(why, kind="sentence"), Cell(how, kind="sentence")]
        for what, why, how in absent(here, info)
    ]
    if not rows:
        return
    st.subheader(f"What {here.store.sae} lacks")
    headings = [
        Heading("what", align="left"),
        Heading("why", align="left"),
        Heading("the command that adds it", align="left"),
    ]
    table(headings, rows, name="What is missing", key="missing-tables")


def absent(here: Here, info: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, why, command) of everything that could be in the store and is not."""
    store, sae = here.store.path, here.store.sae
    index = f"saebench index RUN --cache CACHE --out {store} --name {sae}"
    reasons: dict[str, list[str]] = {}
    for name, why in {**info["missing"], **info["left_out"]}.items():
        reasons.setdefault(why.rstrip("."), []).append(name.replace("_", " "))
    found: list[tuple[str, str, str]] = []
    for why, names in reasons.items():
        how = f"{index} --with-context-index" if names == ["act by ctx"] else index
        found.append((", ".join(names), why, how if "imported" not in why and "no labels" not in why else ""))
    if not info.get("eval"):
        found.append(
            ("evaluation", "the run had no eval.json", f"saebench eval RUN --model cache, then {index}")
        )
    if not here.store.has("explained"):
        found.append(("explanations", "not made yet", f"saebench explain {store} --sae {sae}"))
    if not here.store.has("effect"):
        found.append(("loss effects", "not measured yet", f"saebench effects {store} --run RUN"))
    return found
