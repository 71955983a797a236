"""The side panels of the Feature page: histogram, promoted tokens, tokens, similar features, positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from saebench.core.formatting import count, is_absent, number, share, visible
from saebench_app.components.head import Choice, Head, Option, heading
from saebench_app.components.histogram import Bar, histogram
from saebench_app.components.notice import notice
from saebench_app.components.table import Cell, Heading, table, text_cell, token_cell
from saebench_app.page.feature.common import PATH, fold, why_missing
from saebench_app.session import Here

SIMILAR_BY = {
    "decoder": ("decoder", "By the cosine similarity of the decoder directions."),
    "encoder": ("encoder", "By the cosine similarity of the encoder directions."),
    "cofire": ("coactivation", "By the tokens on which both fire, of those on which either fires."),
    "correlation": ("correlation", "By the correlation of their activations over tokens."),
}
ROLES = {"previous": "previous token", "active": "active token", "next": "next token"}
NEIGHBORS_SHOWN = 10
LONGEST_NAME = 60


def show_histogram(here: Here, row: dict[str, Any]) -> None:
    view, feature = here.view, row["feature"]
    kinds = {"value": "linear", "log10": "log10"}
    options = [
        Option(label, replace(view, histogram=kind, bin=None).url(PATH, f=feature), view.histogram == kind)
        for kind, label in kinds.items()
    ]
    head = Head("Activation histogram", "Click a bar to see examples from it.", (Choice("Axis", options),))
    bins = here.store.histogram(feature, view.histogram)
    if bins.empty or not bins["count"].sum():
        heading(head, key="histogram-head")
        notice("This feature has no activations.", key="no-histogram")
        return
    log = view.histogram == "log10"
    edges_of = [10**edge if log else edge for edge in (*bins["lo"], bins["hi"].iloc[-1])]
    away = replace(view, bin=None).url(PATH, f=feature)
    bars = [
        Bar(
            n,
            f"{n:,} tokens from {edges_of[at]:.3g} to {edges_of[at + 1]:.3g}",
            away if view.bin == at else f"{away}&bin={at}",
            view.bin == at,
        )
        for at, n in enumerate(bins["count"].tolist())
    ]
    middle = (bins["lo"].iloc[0] + bins["hi"].iloc[-1]) / 2
    edges = [number(edge) for edge in (edges_of[0], 10**middle if log else middle, edges_of[-1])]
    histogram(
        bars,
        name=f"Histogram of {row['n_act']:,} activations from {edges[0]} to {edges[-1]}",
        edges=edges,
        axis="activation, logarithmic" if log else "activation",
        key="histogram",
        head=head,
    )


def show_logits(here: Here, feature: int) -> None:
    head = Head(
        "Promoted and suppressed tokens",
        "Direct effect: change of the next token's logit per unit of activation, through the unembedding.",
    )
    if not here.store.has("logit"):
        heading(head, key="logits-head")
        notice(why_missing(here, "logit"), key="no-logits")
        return
    logits = here.store.logits(feature)
    up, down = (logits[logits["sign"] == sign].to_dict("records") for sign in (1, -1))
    most = max((abs(row["value"]) for row in up + down), default=0) or 1
    rows = [
        [
            Cell(visible(p["text"], spaces="edges"), kind="token"),
            Cell(number(p["value"]), exact=p["value"], bar=abs(p["value"]) / most),
            Cell(visible(s["text"], spaces="edges"), kind="token"),
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
    table(headings, rows, name="Promoted and suppressed tokens", key="logits", head=head)


def show_tokens(here: Here, row: dict[str, Any]) -> None:
    view, feature = here.view, row["feature"]
    options = [
        Option(label, replace(view, role=role).url(PATH, f=feature), view.role == role)
        for role, label in ROLES.items()
    ]
    head = Head(
        "Tokens",
        "The tokens that it fires on, and the tokens before and after them.",
        (Choice("Token", options),),
    )
    if not here.store.has("feature_token"):
        heading(Head("Tokens"), key="tokens-head")
        notice(why_missing(here, "feature_token"), key="no-tokens")
        return
    if row["dead"]:
        heading(head, key="tokens-head")
        notice("This feature fires on no token.", key="no-tokens")
        return
    rows = [
        [
            Cell(visible(token["text"], spaces="edges"), kind="token"),
            Cell(count(token["n"]), exact=token["n"]),
            *(
                Cell(share(token[p]), token[p], bar=token[p])
                for p in ("p_token_given_fire", "p_fire_given_token")
            ),
        ]
        for token in here.store.tokens(feature, view.role).to_dict("records")
    ]
    headings = [
        Heading("token", align="left"),
        Heading("count"),
        Heading("P(token|fires)", help="share of its activations that have the token there"),
        Heading("P(fires|token)", help="share of the token's occurrences there at which it fires"),
    ]
    name = {
        "active": "Tokens it fires on",
        "previous": "Tokens before those it fires on",
        "next": "Tokens after those it fires on",
    }
    table(headings, rows, name=name[view.role], key="tokens", height="20rem", head=head)


def show_similar(here: Here, feature: int) -> None:
    view = here.view
    options = [
        Option(label, replace(view, near=kind).url(PATH, f=feature), view.near == kind, help)
        for kind, (label, help) in SIMILAR_BY.items()
    ]
    head = Head("Similar features", SIMILAR_BY[view.near][1], (Choice("Similar by", options),))
    near = here.store.neighbors(feature, view.near).head(NEIGHBORS_SHOWN)
    if near.empty:
        heading(head, key="neighbors-head")
        notice("The store has no similar features of this kind.", key="no-neighbors")
        return
    names = ["feature", "density", "top_token", "explanation"]
    others = here.store.features(names, among=near["other"].tolist()).set_index("feature").to_dict("index")
    score = "cosine" if "cosine" in near else "score"
    named = any(_name(here, other, others[other]) for other in near["other"])
    text = here.store.has("token")
    rows = []
    for other, value in zip(near["other"].tolist(), near[score].tolist(), strict=True):
        row = others[other]
        cells = [
            Cell(str(other), exact=other, href=replace(view, bin=None).url(PATH, f=other)),
            Cell(number(value), exact=value, bar=max(value, 0)),
            Cell(share(row["density"]), exact=row["density"]),
        ]
        if text:
            cells.append(token_cell(row["top_token"]))
        rows.append(cells + ([text_cell(_name(here, other, row))] if named else []))
    headings = [Heading("feature", align="left"), Heading(score), Heading("density")]
    headings += [Heading("top token", align="left")] if text else []
    headings += [Heading("name", align="left", help="its label, or else its explanation")] if named else []
    table(headings, rows, name="Similar features", key="neighbors", head=head)


def _name(here: Here, feature: int, row: Mapping[str, Any]) -> str:
    """Its label, or else its explanation, cut to one line."""
    explanation = "" if is_absent(row["explanation"]) else row["explanation"]
    name = str(here.names.get(feature, explanation))
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def show_positions(here: Here, row: dict[str, Any]) -> None:
    """At which positions of a context, and in which documents, it fires."""
    view, feature = here.view, row["feature"]
    if not here.store.has("position") or row["dead"]:
        return
    heading(fold(view, feature, "where", "Positions and documents"), key="where-head")
    if "where" not in view.open:
        return
    places = here.store.positions(feature)
    bars = [
        Bar(
            one.p_fire,
            f"positions {one.lo} to {one.hi - 1}: active on {share(one.p_fire)}, {one.n:,} tokens",
        )
        for one in places.itertuples()
    ]
    edges = [str(places["lo"].iloc[0]), str(places["hi"].iloc[-1] - 1)]
    histogram(
        bars,
        name="Share of the tokens on which it fires, by position",
        edges=edges,
        scale="linear",
        axis="position in the context",
        key="positions",
    )
    if not here.store.has("feature_label"):
        notice(why_missing(here, "feature_label"), key="no-labels")
        return
    rows = [
        [
            Cell(visible(one["label"]), kind="text"),
            Cell(count(one["n"]), exact=one["n"]),
            Cell(share(one["p_label_given_fire"]), one["p_label_given_fire"], bar=one["p_label_given_fire"]),
            Cell(f"{number(one['lift'])} times", exact=one["lift"]),
        ]
        for one in here.store.labels(feature).to_dict("records")
    ]
    headings = [
        Heading("document", align="left"),
        Heading("count"),
        Heading("share", help="share of its activations"),
        Heading("lift", help="enrichment relative to document length"),
    ]
    table(headings, rows, name="Documents it fires in", key="labels")
