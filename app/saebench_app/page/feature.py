"""Feature: everything the store knows of one latent."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import streamlit as st

from saebench.core.errors import UserError
from saebench.core.formatting import count, is_absent, number, one_in, share, visible
from saebench.store.example_windows import distinct
from saebench.store.intervals import standard_error, wilson
from saebench.store.schema import DECILES
from saebench_app.components.head import Choice, Head, Option, heading
from saebench_app.components.histogram import Bar, histogram
from saebench_app.components.lead import lead
from saebench_app.components.notice import notice
from saebench_app.components.statistics import Statistic, statistics
from saebench_app.components.table import Cell, Heading, table, text_cell, token_cell
from saebench_app.components.tokens import examples
from saebench_app.components.verdicts import verdicts
from saebench_app.page.notes import notes
from saebench_app.session import Here
from saebench_app.view import ABOVE, COLORS, WINDOWS, View

PATH = "feature"
TITLE = "Feature"
SECTION = "Look"
GROUPS = {
    "top": ("Strongest", "The largest activation of each context in which it fires hardest."),
    "tenths": ("Tenths", "Some of each tenth of its firings, from the strongest to the weakest."),
    "random": ("Random", "Firings drawn at random."),
    "near-miss": ("Near misses", "Where it stays silent on a token that it fires on elsewhere."),
    "negative": ("Silent", "Windows drawn at random in which it stays silent."),
}
NEAR = {
    "decoder": ("decoder", "By the cosine of their decoder directions."),
    "encoder": ("encoder", "By the cosine of their encoder directions."),
    "cofire": ("together", "Tokens on which both fire, of those on which either does."),
    "correlation": ("correlated", "By the correlation of their activations over tokens."),
}
ROLES = {"previous": "before it", "active": "on it", "next": "after it"}
COLOR_HELP = {
    "linear": "as the activation",
    "sqrt": "as its square root: weak ones can be told apart",
    "rank": "by its place among those shown",
}
ONWARD = {"prompt": "Test on a text", "steer": "Steer"}
NEIGHBORS_SHOWN = 10
EXAMPLES_OF_BAR = 20
LONGEST_CALLED = 60


def show(here: Here) -> None:
    feature = here.feature()
    if feature is None:
        first = here.store.features(["feature"], **here.filters(), **here.view.order(), limit=1)["feature"]
        feature = int(first.iloc[0]) if len(first) else 0
    row = here.store.feature(feature)
    _header(here, row)
    _lead(here, row)
    notes(here, feature)
    statistics(_statistics(row, here), key="statistics")
    if "explanations" in here.view.open:
        _explanations(here, row)
    left, right = st.columns([11, 9], gap="medium")
    with left:
        _examples(here, row)
    with right:
        _distribution(here, row)
        _logits(here, feature)
        _tokens(here, row)
        _neighbors(here, feature)
        _where(here, row)


def _header(here: Here, row: dict[str, Any]) -> None:
    view, feature = here.view, row["feature"]
    try:
        before, after = here.store.neighbors_in_order(feature, **here.filters(), **view.order())
        problem = None
    except UserError as error:  # a pattern that is none, or a list that has gone
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
            st.button("Random", key="Random", shortcut="X", on_click=_jump, args=(here,),
                      help="Any of the listed features.")  # fmt: skip
            st.number_input(
                "Go to feature", 0, here.store.info()["d_sae"] - 1, key="goto", width=120,
                label_visibility="collapsed", on_change=lambda: here.show(view, f=st.session_state["goto"]),
            )  # fmt: skip
    if problem:
        notice(problem, key="refused", kind="error")


def _step(here: Here, label: str, to: int | None, shortcut: str) -> None:
    st.button(label, key=label, shortcut=shortcut, disabled=to is None,
              on_click=here.show, args=(here.view,), kwargs={"f": to})  # fmt: skip


def _jump(here: Here) -> None:
    found = here.store.count_features(**here.filters())
    if found:
        offset = random.randrange(found)
        listed = here.store.features(["feature"], **here.filters(), limit=1, offset=offset)
        here.show(here.view, f=int(listed["feature"].iloc[0]))


def _lead(here: Here, row: dict[str, Any]) -> None:
    score = row.get("explanation_score")
    opened = "explanations" in here.view.open
    links = [
        Option("Hide explanations" if opened else "Explanations and scores",
               here.view.toggled("explanations").url(PATH, f=row["feature"])),
        *(Option(label, here.view.url(path, f=row["feature"]))
          for path, label in ONWARD.items() if path in here.pages),
    ]  # fmt: skip
    lead(
        label=here.names.get(row["feature"], ""), explanation=row.get("explanation") or "",
        note="" if score is None else f"explanation score {number(score)}", links=links,
        label_field="Label", key="lead",
    )  # fmt: skip


def _statistics(row: dict[str, Any], here: Here) -> list[Statistic]:
    n, total = row["n_act"], here.store.info()["n_tokens"]
    low, high = wilson(n, total)
    error = standard_error(row["std_act"], n)
    mean = number(row["mean_act"]) if error is None else f"{number(row['mean_act'])} ± {number(error, 2)}"
    tiles = [
        Statistic("Density", share(row["density"]), f"{share(low)} to {share(high)}", row["density"],
                  f"{one_in(row['density'])}; below, Wilson's 95% interval"),
        Statistic("Fires on", count(n), f"of {count(total)} tokens", n, one_in(row["density"])),
        Statistic("Largest", number(row["max_act"]), f"99% below {number(row['p99'])}", row["max_act"]),
        Statistic("Mean", mean, f"sd {number(row['std_act'])}, median {number(row['p50'])}",
                  row["mean_act"], "over the tokens on which it fires, ± its standard error"),
    ]  # fmt: skip
    if here.store.has("context"):
        documents = f"{count(row['n_doc_act'])} documents"
        tiles.append(Statistic("Contexts", count(row["n_ctx_act"]), documents, row["n_ctx_act"]))
    if here.store.has("feature_token") and not row["dead"]:
        entropy, top = f"{number(row['entropy_tok'])} bits", f"top token {share(row['top_token_share'])}"
        tiles.append(
            Statistic("Token entropy", entropy, top, row["entropy_tok"], "0: it fires on one token only")
        )
    if row.get("loss_effect") is not None:
        tiles.append(
            Statistic("Loss effect", number(row["loss_effect"]), f"KL {number(row['kl'])}",
                      row["loss_effect"], "change of the model's loss without it, nats a token")
        )  # fmt: skip
    cosine = row["enc_dec_cos"]
    tiles.append(Statistic("Encoder · decoder", number(cosine), "cosine of the two", cosine))
    return tiles


# Examples


def _examples(here: Here, row: dict[str, Any]) -> None:
    view, feature = here.view, row["feature"]
    if not here.store.has("context"):
        heading(Head("Examples"), key="examples-head")
        notice(_why(here, "context"), key="no-examples")
        return
    head = Head("Examples", choices=(_groups(view, feature), _windows(view, feature)))
    if row["dead"] and view.group not in ("near-miss", "negative"):
        heading(head, key="examples-head")
        notice(
            "This feature fires on no token of the indexed text, so it has no examples.", key="no-examples"
        )
        return
    shown = _chosen_examples(here, row)
    if view.distinct:
        shown = distinct(shown, view.window)
    if not shown:
        heading(head, key="examples-head")
        notice("The store has no examples of this kind; choose another one.", key="no-examples")
        return
    examples(
        shown, scale=row["max_act"], window=view.window, key="examples", kind=view.colors,
        above=view.above / 100, lines=view.lines, head=head, settings=_display(view, feature),
        name=f"Feature {feature} of {here.store.sae}",
        place=lambda one: view.url("context", c=one["ctx"], f1=feature, pos=one["pos"]),
    )  # fmt: skip


def _chosen_examples(here: Here, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of the bar, the group, or all tenths, of which the first of each has a title."""
    view, feature = here.view, row["feature"]
    if view.bin is not None:
        drawn = here.store.examples_in_bin(feature, view.bin, view.histogram, n=EXAMPLES_OF_BAR)
        return list(drawn.to_dict("records"))
    if view.group != "tenths":
        known = view.group in GROUPS or view.group in [f"decile-{tenth}" for tenth in DECILES]
        return list(here.store.examples(feature, view.group if known else "top").to_dict("records"))
    frame = here.store.examples(feature)
    shown: list[dict[str, Any]] = []
    for tenth in reversed(DECILES):
        own = frame[frame["group"] == f"decile-{tenth}"].to_dict("records")
        if own:
            least, most = (number(of(one["value"] for one in own)) for of in (min, max))
            own[0]["title"] = f"Tenth {tenth} of its firings, here from {least} to {most}"
        shown += own
    return shown


def _groups(view: View, feature: int) -> Choice:
    options = [
        Option(label, replace(view, group=group, bin=None).url(PATH, f=feature),
               view.bin is None and view.group == group, help)
        for group, (label, help) in GROUPS.items()
    ]  # fmt: skip
    if view.bin is not None:
        options.append(
            Option(f"Bar {view.bin + 1}", view.url(PATH, f=feature), True, "Drawn from the chosen bar.")
        )
    return Choice("Which examples", options)


def _windows(view: View, feature: int) -> Choice:
    return Choice(
        "Tokens on each side",
        [
            Option(f"±{n}" if n else "all", replace(view, window=n).url(PATH, f=feature), view.window == n)
            for n in WINDOWS
        ],
    )


def _display(view: View, feature: int) -> Head:
    def switch(label: str, off: str, on: str, now: bool, turned: View) -> Choice:
        there, back = view.url(PATH, f=feature), turned.url(PATH, f=feature)
        return Choice(
            label,
            [Option(off, back if now else there, not now), Option(on, there if now else back, now)],
        )

    return Head(
        "Display and copy",
        choices=(
            Choice("Color grows", [
                Option(kind, replace(view, colors=kind).url(PATH, f=feature), view.colors == kind,
                       COLOR_HELP[kind])
                for kind in COLORS
            ]),
            Choice("Colored from", [
                Option(f"{part}%", replace(view, above=part).url(PATH, f=feature), view.above == part,
                       "of its largest activation")
                for part in ABOVE
            ]),
            switch("Line breaks", "as signs", "break the line", view.lines,
                   replace(view, lines=not view.lines)),
            switch("Equal windows", "all", "once", view.distinct,
                   replace(view, distinct=not view.distinct)),
        ),
    )  # fmt: skip


# Explanations


def _explanations(here: Here, row: dict[str, Any]) -> None:
    view, feature = here.view, row["feature"]
    head = _fold(view, feature, "explanations", "Explanations")
    found = here.store.explanations(feature)
    if found.empty:
        heading(head, key="explanations-head")
        command = f"saebench explain {here.store.path} --features {feature}"
        notice(f"There is no explanation of this feature yet. Make one with: {command}", key="unexplained")
        return
    rows = [_explanation(one) for one in found.to_dict("records")]
    headings = [
        Heading("by", align="left"), Heading("explanation", align="left"),
        Heading("score", help="F1 of a rule, balanced accuracy of a text, on documents held out"),
        Heading("95%"),
    ]  # fmt: skip
    table(headings, rows, name="Explanations", key="explanations", head=head)
    scores = here.store.explanation_scores(feature)
    if len(scores):
        headings = [Heading("by", align="left"), Heading("measured by", align="left")]
        headings += [Heading(label) for label in ("value", "95%", "precision", "recall", "AUC", "unanswered")]
        table(headings, [_score(one) for one in scores.to_dict("records")],
              name="Scores and what they are to be compared with", key="scores")  # fmt: skip
    items = here.store.explanation_items(feature)
    if items.empty:
        return
    heading(_fold(view, feature, "verdicts", f"All {len(items)} verdicts"), key="verdicts-head")
    if "verdicts" in view.open:
        verdicts(here.store, items, key="verdicts")


def _explanation(one: Mapping[str, Any]) -> list[Cell]:
    reason = one["status"] if is_absent(one["reason"]) else one["reason"]
    said = f"none: {reason}" if is_absent(one["text"]) else one["text"]
    return [
        Cell(visible(f"{one['provider']} {one['model'] or ''}".strip())),
        Cell(visible(said), kind="text"),
        Cell(number(one["score"]), exact=_exact(one["score"])),
        Cell(_interval(one)),
    ]


def _score(one: Mapping[str, Any]) -> list[Cell]:
    return [
        Cell(visible(f"{one['provider']} {one['model'] or ''}".strip())),
        Cell(visible(one["scorer"])),
        Cell(number(one["value"]), exact=_exact(one["value"])),
        Cell(_interval(one)),
        *(Cell(number(one[name]), exact=_exact(one[name])) for name in ("precision", "recall", "auc")),
        Cell(count(one["n_failed"])),
    ]


def _interval(one: Mapping[str, Any]) -> str:
    low, high = _exact(one["ci_lo"]), _exact(one["ci_hi"])
    return "" if low is None or high is None else f"{number(low)} to {number(high)}"


def _exact(value: Any) -> float | None:
    return None if value is None or value != value else float(value)


# Distribution, tokens, neighbors


def _distribution(here: Here, row: dict[str, Any]) -> None:
    view, feature = here.view, row["feature"]
    kinds = {"value": "linear", "log10": "log10"}
    options = [
        Option(label, replace(view, histogram=kind, bin=None).url(PATH, f=feature), view.histogram == kind)
        for kind, label in kinds.items()
    ]
    head = Head("Activations", "A click on a bar shows examples from it.", (Choice("Axis", options),))
    bins = here.store.histogram(feature, view.histogram)
    if bins.empty or not bins["count"].sum():
        heading(head, key="histogram-head")
        notice("No activations.", key="no-histogram")
        return
    log = view.histogram == "log10"
    edges_of = [10**edge if log else edge for edge in (*bins["lo"], bins["hi"].iloc[-1])]
    away = replace(view, bin=None).url(PATH, f=feature)
    bars = [
        Bar(
            n, f"{n:,} tokens from {edges_of[at]:.3g} to {edges_of[at + 1]:.3g}",
            away if view.bin == at else f"{away}&bin={at}", view.bin == at,
        )
        for at, n in enumerate(bins["count"].tolist())
    ]  # fmt: skip
    middle = (bins["lo"].iloc[0] + bins["hi"].iloc[-1]) / 2
    edges = [number(edge) for edge in (edges_of[0], 10**middle if log else middle, edges_of[-1])]
    histogram(
        bars, name=f"Histogram of {row['n_act']:,} activations from {edges[0]} to {edges[-1]}", edges=edges,
        axis="activation, logarithmic" if log else "activation", key="histogram", head=head,
    )  # fmt: skip


def _logits(here: Here, feature: int) -> None:
    head = Head(
        "Effect on the next token",
        "Change of a token's logit for one unit of activation, straight through the unembedding.",
    )
    if not here.store.has("logit"):
        heading(head, key="logits-head")
        notice(_why(here, "logit"), key="no-logits")
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


def _tokens(here: Here, row: dict[str, Any]) -> None:
    view, feature = here.view, row["feature"]
    options = [
        Option(label, replace(view, role=role).url(PATH, f=feature), view.role == role)
        for role, label in ROLES.items()
    ]
    head = Head("Tokens", "Those that it fires on, and those beside them.", (Choice("Token", options),))
    if not here.store.has("feature_token"):
        heading(Head("Tokens"), key="tokens-head")
        notice(_why(here, "feature_token"), key="no-tokens")
        return
    if row["dead"]:
        heading(head, key="tokens-head")
        notice("It fires on none.", key="no-tokens")
        return
    rows = [
        [
            Cell(visible(token["text"], spaces="edges"), kind="token"),
            Cell(count(token["n"]), exact=token["n"]),
            *(Cell(share(token[p]), token[p], bar=token[p])
              for p in ("p_token_given_fire", "p_fire_given_token")),
        ]
        for token in here.store.tokens(feature, view.role).to_dict("records")
    ]  # fmt: skip
    headings = [
        Heading("token", align="left"),
        Heading("times"),
        Heading("P(token|fires)", help="share of its firings that have the token there"),
        Heading("P(fires|token)", help="share of the token's occurrences there with which it fires"),
    ]
    name = {"active": "Tokens it fires on", "previous": "Tokens before it", "next": "Tokens after it"}
    table(headings, rows, name=name[view.role], key="tokens", height="20rem", head=head)


def _neighbors(here: Here, feature: int) -> None:
    view = here.view
    options = [
        Option(label, replace(view, near=kind).url(PATH, f=feature), view.near == kind, help)
        for kind, (label, help) in NEAR.items()
    ]
    head = Head("Nearest features", NEAR[view.near][1], (Choice("Nearest by", options),))
    near = here.store.neighbors(feature, view.near).head(NEIGHBORS_SHOWN)
    if near.empty:
        heading(head, key="neighbors-head")
        notice("The store lists no neighbors of this kind.", key="no-neighbors")
        return
    names = ["feature", "density", "top_token", "explanation"]
    others = here.store.features(names, among=near["other"].tolist()).set_index("feature").to_dict("index")
    score = "cosine" if "cosine" in near else "score"
    called = any(_called(here, other, others[other]) for other in near["other"])
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
        rows.append(cells + ([text_cell(_called(here, other, row))] if called else []))
    headings = [Heading("feature", align="left"), Heading(score), Heading("density")]
    headings += [Heading("top token", align="left")] if text else []
    headings += [Heading("called", align="left", help="its label, or else its explanation")] if called else []
    table(headings, rows, name="Nearest features", key="neighbors", head=head)


def _called(here: Here, feature: int, row: Mapping[str, Any]) -> str:
    explanation = "" if is_absent(row["explanation"]) else row["explanation"]
    called = str(here.names.get(feature, explanation))
    return called if len(called) <= LONGEST_CALLED else f"{called[: LONGEST_CALLED - 1]}…"


def _where(here: Here, row: dict[str, Any]) -> None:
    """Where in a context, and in which documents."""
    view, feature = here.view, row["feature"]
    if not here.store.has("position") or row["dead"]:
        return
    heading(_fold(view, feature, "where", "Positions and documents"), key="where-head")
    if "where" not in view.open:
        return
    places = here.store.positions(feature)
    bars = [
        Bar(one.p_fire, f"positions {one.lo} to {one.hi - 1}: fires on {share(one.p_fire)}, {one.n:,} times")
        for one in places.itertuples()
    ]
    edges = [str(places["lo"].iloc[0]), str(places["hi"].iloc[-1] - 1)]
    histogram(bars, name="Share of the tokens on which it fires, by position", edges=edges, scale="linear",
              axis="position in the context", key="positions")  # fmt: skip
    if not here.store.has("feature_label"):
        notice(_why(here, "feature_label"), key="no-labels")
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
        Heading("document", align="left"), Heading("times"),
        Heading("share", help="of its firings"),
        Heading("lift", help="how much oftener than by the document's length"),
    ]  # fmt: skip
    table(headings, rows, name="Documents it fires in", key="labels")


def _fold(view: View, feature: int, part: str, title: str) -> Head:
    """A heading whose part is shown once it is opened."""
    href = view.toggled(part).url(PATH, f=feature)
    option = Option("hide" if part in view.open else "show", href, part in view.open)
    return Head(title, choices=(Choice(title, (option,)),))


def _why(here: Here, table_name: str) -> str:
    """Why the store lacks a table, as its index said it."""
    reason = here.store.why_missing(table_name)
    return f"{reason[:1].upper()}{reason[1:].rstrip('.')}."
