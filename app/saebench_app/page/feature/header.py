"""The head of the Feature page: its name, the steps to other features, and its statistics."""

from __future__ import annotations

import random
from typing import Any

import streamlit as st

from saebench.core.errors import UserError
from saebench.core.formatting import count, number, one_in, share
from saebench.store.intervals import standard_error, wilson
from saebench_app.components.head import Option
from saebench_app.components.lead import lead
from saebench_app.components.notice import notice
from saebench_app.components.statistics import Statistic
from saebench_app.page.feature.common import PATH
from saebench_app.session import Here

ONWARD = {"prompt": "Test on a text", "steer": "Steer"}
"""Other pages that the feature can be taken to -> what their link is called."""


def show_header(here: Here, row: dict[str, Any]) -> None:
    view, feature = here.view, row["feature"]
    try:
        before, after = here.store.neighbors_in_order(feature, **here.filters(), **view.order())
        problem = None
    except UserError as error:  # an invalid pattern, or a list that was removed
        before = after = None
        problem = str(error)
    st.session_state["goto"] = feature
    with st.container(
        key="header", horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"
    ):
        with st.container(horizontal=True, vertical_alignment="center", width="content"):
            st.title(f"Feature {feature}", width="content")
            for flag in ("dead", "dense"):
                if row[flag]:
                    st.badge(flag, color="gray")
        with st.container(horizontal=True, vertical_alignment="center", width="content"):
            _step(here, "Previous", before, "Left")
            _step(here, "Next", after, "Right")
            st.button(
                "Random",
                key="Random",
                shortcut="X",
                on_click=_jump,
                args=(here,),
                help="A random one of the listed features.",
            )
            st.number_input(
                "Go to feature",
                0,
                here.store.info()["d_sae"] - 1,
                key="goto",
                width=120,
                label_visibility="collapsed",
                on_change=lambda: here.show(view, f=st.session_state["goto"]),
            )
    if problem:
        notice(problem, key="refused", kind="error")


def _step(here: Here, label: str, to: int | None, shortcut: str) -> None:
    st.button(
        label,
        key=label,
        shortcut=shortcut,
        disabled=to is None,
        on_click=here.show,
        args=(here.view,),
        kwargs={"f": to},
    )


def _jump(here: Here) -> None:
    found = here.store.count_features(**here.filters())
    if found:
        offset = random.randrange(found)
        listed = here.store.features(["feature"], **here.filters(), limit=1, offset=offset)
        here.show(here.view, f=int(listed["feature"].iloc[0]))


def show_lead(here: Here, row: dict[str, Any]) -> None:
    score = row.get("explanation_score")
    opened = "explanations" in here.view.open
    links = [
        Option(
            "Hide explanations" if opened else "Explanations and scores",
            here.view.toggled("explanations").url(PATH, f=row["feature"]),
        ),
        *(
            Option(label, here.view.url(path, f=row["feature"]))
            for path, label in ONWARD.items()
            if path in here.pages
        ),
    ]
    lead(
        label=here.names.get(row["feature"], ""),
        explanation=row.get("explanation") or "",
        note="" if score is None else f"explanation score {number(score)}",
        links=links,
        label_field="Label",
        key="lead",
    )


def tiles(row: dict[str, Any], here: Here) -> list[Statistic]:
    n, total = row["n_act"], here.store.info()["n_tokens"]
    low, high = wilson(n, total)
    error = standard_error(row["std_act"], n)
    mean = number(row["mean_act"]) if error is None else f"{number(row['mean_act'])} ± {number(error, 2)}"
    found = [
        Statistic(
            "Activation density",
            share(row["density"]),
            f"{share(low)} to {share(high)}",
            row["density"],
            f"{one_in(row['density'])}; below: Wilson's 95% interval",
        ),
        Statistic("Active tokens", count(n), f"of {count(total)} tokens", n, one_in(row["density"])),
        Statistic(
            "Max activation", number(row["max_act"]), f"99% below {number(row['p99'])}", row["max_act"]
        ),
        Statistic(
            "Mean activation",
            mean,
            f"std {number(row['std_act'])}, p50 {number(row['p50'])}",
            row["mean_act"],
            "over the tokens on which it fires, ± its standard error",
        ),
    ]
    if here.store.has("context"):
        documents = f"{count(row['n_doc_act'])} documents"
        found.append(Statistic("Contexts", count(row["n_ctx_act"]), documents, row["n_ctx_act"]))
    if here.store.has("feature_token") and not row["dead"]:
        entropy, top = f"{number(row['entropy_tok'])} bits", f"top token {share(row['top_token_share'])}"
        found.append(
            Statistic("Token entropy", entropy, top, row["entropy_tok"], "0 bits: it fires on one token only")
        )
    if row.get("loss_effect") is not None:
        found.append(
            Statistic(
                "Loss effect",
                number(row["loss_effect"]),
                f"KL {number(row['kl'])}",
                row["loss_effect"],
                "change of the model's loss when it is ablated, in nats per token",
            )
        )
    cosine = row["enc_dec_cos"]
    if cosine is not None:
        found.append(Statistic("Enc-dec cosine", number(cosine), "of both directions", cosine))
    return found
