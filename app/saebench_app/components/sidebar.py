"""The sidebar of every page: links to the pages, the SAE that is shown, its quality, missing tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import streamlit as st

from saebench.core.errors import UserError
from saebench.core.formatting import number, share
from saebench_app.components.head import Option
from saebench_app.components.notice import notice
from saebench_app.components.statistics import Statistic, statistics
from saebench_app.components.web import show
from saebench_app.session import Here, move_to_newest
from saebench_app.view import View

POLL_SECONDS = 10


def sidebar(here: Here, sections: Mapping[str, Sequence[str]], current: str) -> None:
    """``sections``: title -> paths of its pages, in order; ``current`` is the page that is shown."""
    with st.sidebar:
        menu = [
            {"title": section, "links": [asdict(_link(here, path, path == current)) for path in paths]}
            for section, paths in sections.items()
        ]
        show("menu", {"sections": menu}, key="menu")
        _pick_sae(here)
        info = here.store.info()
        statistics(quality(info), key="quality", small=True)
        for at, sentence in enumerate(absences(info["missing"])):
            notice(sentence, key=f"missing{at}")
        _new_generation(here)


def _link(here: Here, path: str, current: bool) -> Option:
    """The link to a page, with the view that is kept from page to page."""
    feature = here.feature() if path == "feature" else None
    address = here.pages[path].url_path or "."
    href = here.view.url(address) if feature is None else here.view.url(address, f=feature)
    return Option(here.pages[path].title, href, current)


def quality(info: dict[str, Any]) -> list[Statistic]:
    """The quality of an SAE, as its evaluation measured it on held-out rows."""
    measured = info["eval"] or {}
    dead = measured.get("dead_fraction", info["n_dead"] / info["d_sae"])
    helps = {
        "l0": ("L0", "active latents per token"),
        "explained_variance": ("Expl. variance", "share of the variance that the SAE reconstructs"),
        "ce_loss_score": (
            "CE score",
            "loss recovered. 1: the reconstruction costs the model nothing; 0: as bad as zero ablation",
        ),
    }
    absent = "not measured: run saebench eval with a model, then index again"
    l0, variance, score = (
        Statistic(
            name,
            number(measured.get(key)),
            exact=measured.get(key),
            help=help_ if measured.get(key) else absent,
        )
        for key, (name, help_) in helps.items()
    )
    return [
        l0,
        Statistic("Dead", share(dead), exact=dead, help="share of the latents that never fire"),
        variance,
        score,
    ]


def absences(missing: dict[str, str]) -> list[str]:
    """A sentence for each reason why tables are missing."""
    reasons: dict[str, list[str]] = {}
    for table, why in missing.items():
        reasons.setdefault(why.rstrip("."), []).append(table.replace("_", " "))
    return [f"Missing: {', '.join(tables)} ({why})." for why, tables in reasons.items()]


def _pick_sae(here: Here) -> None:
    st.session_state["sae"] = here.store.sae
    st.selectbox(
        "SAE", here.store.saes, key="sae", on_change=lambda: here.show(View(sae=st.session_state["sae"]))
    )


@st.fragment(run_every=POLL_SECONDS)
def _new_generation(here: Here) -> None:
    """Offer the generation that was indexed since the session began."""
    try:
        newer = here.store.newer_generation()
    except UserError as error:
        notice(str(error), key="gone", kind="error")
        return
    if newer is None:
        st.caption(f"Generation {here.store.generation} of the store")
    elif st.button(
        f"Show generation {newer}", help="The store was indexed again.", width="stretch", type="primary"
    ):
        move_to_newest()
        st.rerun()
