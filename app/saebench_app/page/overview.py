"""Store: its SAEs and their quality, its text, whether its files are intact, how to add another SAE."""

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
from saebench_app.sites import reads, writes
from saebench_app.view import View
from saebench_app.work import Task, found

PATH = "store"
TITLE = "Store"
SECTION = "Browse"
MOST_OVERLAID = 8
"""SAEs in one density plot: as many as there are colors that are easy to tell apart."""


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
    """The SAEs of the store side by side; opens each of them, once per generation."""
    return store.compare()


def _extent(here: Here, info: dict[str, Any], saes: pd.DataFrame) -> list[Statistic]:
    sites = [("Hook", info["hook_name"])]
    if info["sites"] != info["targets"]:
        sites = [("Reads", reads(info)), ("Writes", writes(info))]
    elif len(info["sites"]) > 1:
        sites = [("Sites", reads(info))]
    model = " and ".join(info.get("models", [])) or info["model"]
    facts = [("Model", model), *sites, ("Text", info["text"])]
    amounts = [("Tokens", "n_tokens"), ("Contexts", "n_contexts"), ("Documents", "n_documents")]
    if info.get("modality", "text") != "text":
        amounts = [("Rows", "n_tokens"), ("Units", "n_contexts")]
    size = int(saes["bytes"].sum())
    tiles = [Statistic(name, str(fact)) for name, fact in facts if fact]
    tiles += [
        Statistic(name, count(info.get(key)), exact=info[key]) for name, key in amounts if info.get(key)
    ]
    return [
        *tiles,
        Statistic("Size", human_bytes(size), "without the text", size),
        Statistic(
            "Generation",
            count(here.store.generation),
            help="every change of the store makes a new generation",
        ),
    ]


HEADINGS = [
    Heading("name", align="left"),
    Heading("architecture", align="left"),
    Heading("site", align="left", help="what it reads, and what it reconstructs if that is something else"),
    Heading("features"),
    Heading("k"),
    Heading("L0", help="active latents per token of the indexed text"),
    Heading("explained variance", help="share of the variance that the SAE reconstructs, on held-out rows"),
    Heading(
        "CE score",
        help="loss recovered. 1: the reconstruction costs the model nothing; 0: as bad as zero ablation",
    ),
    Heading("dead", help="share of the latents that never fire on the indexed text"),
    Heading("dense", help="share of the latents that fire on more than a tenth of the tokens"),
    Heading("labels", help="features with a label"),
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
        Cell(row["reads"] if row["reads"] == row["writes"] else f"{row['reads']} → {row['writes']}"),
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
        "Activation density",
        help="Each line is an SAE: the share of its features at each activation density.",
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
    st.subheader(
        "Integrity",
        help="The check compares the checksums of all files, and every table with the others and with the "
        "activations.",
    )
    task = Task("check", {"store": str(here.store.path)}, (str(here.store.path),))
    result = found(task)
    if result is not None:
        findings, generation = result.facts["findings"], result.facts["generation"]
        when = f"generation {generation}, checked {result.facts['time'][:16].replace('T', ' ')} UTC"
        if findings:
            n = len(findings)
            notice(
                f"The store is damaged in {n} place{'' if n == 1 else 's'} ({when}). Index the SAE again.",
                key="health",
                kind="error",
            )
            headings = [Heading("where", align="left"), Heading("problem", align="left")]
            rows = [[Cell(one["where"]), Cell(one["problem"], kind="sentence")] for one in findings]
            table(headings, rows, name="Damage", key="findings", height="16rem")
        else:
            notice(f"No damage was found ({when}).", key="health")
        if generation != here.store.generation:
            notice(
                f"Generation {here.store.generation}, which is shown, has not been checked.", key="health-old"
            )
    else:
        notice("Not checked yet.", key="health")
    working(
        task,
        "Check again" if result else "Check the store",
        note="reads every file and recomputes the tables",
    )


def _missing(here: Here, info: dict[str, Any]) -> None:
    """What its evaluation warns of, what the store does not have for the SAE that is shown, and the commands
    that add it."""
    warnings = (info.get("eval") or {}).get("warnings") or []
    if warnings:
        st.subheader(f"Warnings for {here.store.sae}")
        found = [[Cell(str(sentence), kind="sentence")] for sentence in warnings]
        table([Heading("warning", align="left")], found, name="Warnings", key="warnings")
    rows = [
        [Cell(what, kind="sentence"), Cell(why, kind="sentence"), Cell(how, kind="sentence")]
        for what, why, how in absent(here, info)
    ]
    if not rows:
        return
    st.subheader(f"Missing for {here.store.sae}")
    headings = [
        Heading("missing", align="left"),
        Heading("reason", align="left"),
        Heading("command that adds it", align="left"),
    ]
    table(headings, rows, name="What is missing", key="missing-tables")


def absent(here: Here, info: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, reason, command) of everything that could be in the store and is not."""
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
