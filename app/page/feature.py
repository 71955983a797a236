"""Feature: everything the store knows of one latent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import streamlit as st

from saebench_app.components.histogram import histogram
from saebench_app.components.notice import notice
from saebench_app.components.statistics import Statistic, statistics
from saebench_app.components.table import Cell, Heading, table
from saebench_app.components.tokens import examples
from saebench_app.numbers import count, number, one_in, share
from saebench_app.session import Here
from saebench_app.text import visible
from saebench_app.view import WINDOWS

PATH = "feature"
TITLE = "Feature"
GROUPS = {"top": "Strongest", "random": "Random"}
NEIGHBORS_SHOWN = 10


def show(here: Here) -> None:
    feature = here.feature()
    if feature is None:
        first = here.store.features(["feature"], **here.view.filters(), **here.view.order(), limit=1)[
            "feature"
        ]
        feature = int(first.iloc[0]) if len(first) else 0
    row = here.store.feature(feature)
    _header(here, row)
    statistics(_statistics(row, here), key="statistics")
    left, right = st.columns([11, 9], gap="medium")
    with left:
        _examples(here, row)
    with right:
        _distribution(here, row)
        _logits(here, feature)
        _tokens(here, row)
        _neighbors(here, feature)


def _header(here: Here, row: dict[str, Any]) -> None:
    view, feature = here.view, row["feature"]
    before, after = here.store.neighbours_in_order(feature, **view.filters(), **view.order())
    st.session_state["goto"] = feature
    with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
        with st.container(horizontal=True, vertical_alignment="center", width="content"):
            st.title(f"Feature {feature}", width="content")
            for flag in ("dead", "dense"):
                if row[flag]:
                    st.badge(flag, color="gray")
        with st.container(horizontal=True, vertical_alignment="center", width="content"):
            _step(here, "Previous", before, "Left")
            _step(here, "Next", after, "Right")
            st.number_input(
                "Go to feature", 0, here.store.info()["d_sae"] - 1, key="goto", width=120,
                label_visibility="collapsed", on_change=lambda: here.show(view, f=st.session_state["goto"]),
            )  # fmt: skip


def _step(here: Here, label: str, to: int | None, shortcut: str) -> None:
    st.button(label, key=label, shortcut=shortcut, disabled=to is None,
              on_click=here.show, args=(here.view,), kwargs={"f": to})  # fmt: skip


def _statistics(row: dict[str, Any], here: Here) -> list[Statistic]:
    tiles = [
        Statistic("Density", share(row["density"]), one_in(row["density"]), row["density"]),
        Statistic("Fires on", count(row["n_act"]), "tokens", row["n_act"]),
        Statistic("Largest", number(row["max_act"]), f"99% below {number(row['p99'])}", row["max_act"]),
        Statistic("Mean", number(row["mean_act"]), f"± {number(row['std_act'])}, median {number(row['p50'])}",
                  row["mean_act"], "over the tokens on which it fires"),
    ]  # fmt: skip
    if here.store.has("context"):
        documents = f"{count(row['n_doc_act'])} documents"
        tiles.append(Statistic("Contexts", count(row["n_ctx_act"]), documents, row["n_ctx_act"]))
    if here.store.has("feature_token") and not row["dead"]:
        entropy, top = f"{number(row['entropy_tok'])} bits", f"top token {share(row['top_token_share'])}"
        tiles.append(
            Statistic("Token entropy", entropy, top, row["entropy_tok"], "0: it fires on one token only")
        )
    cosine = row["enc_dec_cos"]
    tiles.append(Statistic("Encoder · decoder", number(cosine), "cosine of the two", cosine))
    return tiles


def _examples(here: Here, row: dict[str, Any]) -> None:
    view, feature = here.view, row["feature"]
    if not here.store.has("context"):
        st.subheader("Examples")
        notice(_why(here, "context"), key="no-examples")
        return
    group = view.group if view.group in GROUPS else "top"
    st.session_state.update({"group": group, "window": view.window})

    def apply() -> None:
        here.show(
            replace(view, group=st.session_state["group"], window=st.session_state["window"]), f=feature
        )

    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.subheader("Examples", width="content")
        st.space("stretch")
        st.segmented_control(
            "Examples", list(GROUPS), format_func=lambda name: GROUPS[name], key="group", on_change=apply,
            required=True, label_visibility="collapsed",
        )  # fmt: skip
        st.segmented_control(
            "Tokens on each side", WINDOWS, format_func=lambda n: f"±{n}" if n else "all", key="window",
            on_change=apply, required=True, label_visibility="collapsed",
        )  # fmt: skip
    if row["dead"]:
        notice(
            "This feature fires on no token of the indexed text, so it has no examples.", key="no-examples"
        )
        return
    shown = here.store.examples(feature, group=group).to_dict("records")
    examples(
        shown, scale=row["max_act"], window=view.window, key="examples",
        place=lambda row: view.url("context", c=row["ctx"], f1=feature, pos=row["pos"]),
    )  # fmt: skip


def _distribution(here: Here, row: dict[str, Any]) -> None:
    st.subheader("Activations")
    if row["dead"]:
        notice("No activations.", key="no-histogram")
    else:
        histogram(here.store.histogram(row["feature"]), key="histogram")


def _logits(here: Here, feature: int) -> None:
    st.subheader(
        "Effect on the next token",
        help="Change of a token's logit for one unit of activation, straight through the unembedding.",
    )
    if not here.store.has("logit"):
        notice(_why(here, "logit"), key="no-logits")
        return
    logits = here.store.logits(feature)
    up, down = (logits[logits["sign"] == sign].to_dict("records") for sign in (1, -1))
    most = max((abs(row["value"]) for row in up + down), default=0) or 1
    rows = [
        [
            Cell(visible(p["text"], edges=True), kind="token"),
            Cell(number(p["value"]), exact=p["value"], bar=abs(p["value"]) / most),
            Cell(visible(s["text"], edges=True), kind="token"),
            Cell(number(s["value"]), exact=s["value"], bar=abs(s["value"]) / most, kind="cold"),
        ]
        for p, s in zip(up, down, strict=False)
    ]
    headings = [
        Heading("promoted", align="left"),
        Heading("logit"),
        Heading("suppressed", align="left"),
        Heading("logit"),
    ]
    table(headings, rows, name="Promoted and suppressed tokens", key="logits")


def _tokens(here: Here, row: dict[str, Any]) -> None:
    st.subheader("Tokens it fires on")
    if not here.store.has("feature_token"):
        notice(_why(here, "feature_token"), key="no-tokens")
        return
    if row["dead"]:
        notice("It fires on none.", key="no-tokens")
        return
    rows = [
        [
            Cell(visible(token["text"], edges=True), kind="token"),
            Cell(count(token["n"]), exact=token["n"]),
            Cell(
                share(token["p_token_given_fire"]),
                token["p_token_given_fire"],
                bar=token["p_token_given_fire"],
            ),
            Cell(
                share(token["p_fire_given_token"]),
                token["p_fire_given_token"],
                bar=token["p_fire_given_token"],
            ),
        ]
        for token in here.store.tokens(row["feature"]).to_dict("records")
    ]
    headings = [
        Heading("token", align="left"),
        Heading("times"),
        Heading("P(token|fires)", help="share of its firings that fall on the token"),
        Heading("P(fires|token)", help="share of the token's occurrences on which it fires"),
    ]
    table(headings, rows, name="Tokens it fires on", key="tokens", height="20rem")


def _neighbors(here: Here, feature: int) -> None:
    st.subheader("Nearest features", help="By the cosine of their decoder directions.")
    neighbors = here.store.neighbors(feature).head(NEIGHBORS_SHOWN).to_dict("records")
    if not neighbors:
        notice("The store lists no neighbours of this feature.", key="no-neighbors")
        return
    text = here.store.has("token")
    rows = [_neighbor(here, int(near["other"]), float(near["cosine"]), text) for near in neighbors]
    headings = [Heading("feature", align="left"), Heading("cosine"), Heading("density")]
    headings += [Heading("top token", align="left")] if text else []
    table(headings, rows, name="Nearest features", key="neighbors")


def _neighbor(here: Here, other: int, cosine: float, text: bool) -> list[Cell]:
    row = here.store.feature(other)
    cells = [
        Cell(str(other), exact=other, href=here.view.url(PATH, f=other)),
        Cell(number(cosine), exact=cosine, bar=max(cosine, 0)),
        Cell(share(row["density"]), exact=row["density"]),
    ]
    if text:
        cells.append(
            Cell(visible(row["top_token"], edges=True), kind="token")
            if row["top_token"] is not None
            else Cell("")
        )
    return cells


def _why(here: Here, table_name: str) -> str:
    """Why the store lacks a table, as its index said it."""
    reason = here.store.info()["missing"].get(table_name, "the store was indexed without it")
    return f"{reason[:1].upper()}{reason[1:].rstrip('.')}."
